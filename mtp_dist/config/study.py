"""What an experiment's task decides of its training runs, and the rules of the tasks. No torch: bad settings are answered at
once."""

import copy

from mtp_dist.config.compose import differences
from mtp_dist.config.rules import alternatives, one_of
from mtp_dist.config.schema import Study
from mtp_dist.errors import UserError

EXPERIMENTS = ("choice_points", "path_star", "induction", "polynomials", "heads", "schedules", "chaining")
SIZES = ("laptop", "paper")
MOST_DEPTH = 8
"""experiment=choice_points: paths are long enough for so many depths, so that all variants see the same rows."""
OPERATORS = 4
"""experiment=polynomials: negation, sum, product, composition."""


_READ_BY = {
    **{f"{name}.": (name,) for name in ("choice_points", "path_star", "induction", "polynomials")},
    **{f"text.{name}": ("heads", "chaining") for name in ("prompts", "prompt_tokens", "new_tokens", "temperature")},
    "text.": ("heads", "schedules", "chaining"),
    "validation.": (),
}
"""Settings, by how their names begin (the first that fits) -> the experiments that read them."""


def options(overrides: list[str]) -> list[str]:
    """The command line with ``experiment=NAME size=SIZE`` turned into the option of conf/study/ that they name."""
    given, rest = {"experiment": "", "size": "laptop"}, []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key in given and equals:
            given[key] = value
        else:
            rest.append(override)
    one_of("experiment", given["experiment"], EXPERIMENTS)
    one_of("size", given["size"], SIZES)
    return [f"study={given['experiment']}_{given['size']}", *rest]


def settled(config: Study) -> Study:
    """A copy with vocabulary, row length and attention as a made-up task needs them. Raises UserError for a task that cannot
    be."""
    _refuse_unread(config)
    full = copy.deepcopy(config)
    if full.experiment in ("heads", "chaining"):
        _heads(full)
    if full.experiment in _TASKS:
        full.model.document_mask = False  # documents mark the targets that count: see studies/answers.py
        _TASKS[full.experiment](full)
    return full


def _refuse_unread(config: Study) -> None:
    for key, given, _ in differences(config, Study()):
        readers = next((names for start, names in _READ_BY.items() if key.startswith(start)), None)
        if readers is not None and config.experiment not in readers:
            also = f", or choose {alternatives(f'experiment={name}' for name in readers)}" if readers else ""
            raise UserError(f"{key}={given} has no effect with experiment={config.experiment}; leave it out{also}")


def _choice_points(config: Study) -> None:
    task, length, depth = config.choice_points, config.train.sequence_length, config.mtp.depth
    if not depth <= task.choice < length:
        raise UserError(
            f"choice_points.choice={task.choice} must be from mtp.depth={depth} to train.sequence_length - 1 = {length - 1}"
        )
    if (stride := config.mtp.stride) > 1:
        raise UserError(f"mtp.stride={stride} leaps over tokens, and experiment=choice_points counts each; choose mtp.stride=1")
    if config.mtp.kind == "top":
        raise UserError("mtp.kind=top ranks tokens, and experiment=choice_points counts single ones; choose another kind")
    if depth > MOST_DEPTH:
        raise UserError(f"mtp.depth={depth} is more than experiment=choice_points has rows for; choose {MOST_DEPTH} or less")
    config.model.vocab_size = task.choice + 1 + task.branches * (length + MOST_DEPTH - task.choice)


def _path_star(config: Study) -> None:
    task = config.path_star
    needed = 1 + task.degree * task.length
    if task.nodes < needed:
        raise UserError(f"path_star.nodes={task.nodes} is less than the {needed} nodes of a graph; choose {needed} or more")
    config.model.vocab_size = task.nodes + 1
    config.train.sequence_length = 2 * task.degree * task.length + 3 + task.length - 1


def _induction(config: Study) -> None:
    task, length = config.induction, config.train.sequence_length
    if task.mentions <= task.people:
        raise UserError(
            f"induction.mentions={task.mentions} leaves no second mention of each of induction.people={task.people}; choose more"
        )
    if 2 * task.mentions > length:
        raise UserError(
            f"induction.mentions={task.mentions} names of two tokens do not fit in train.sequence_length={length}; choose "
            f"{length // 2} or less"
        )
    if task.people > task.names:
        raise UserError(f"induction.people={task.people} is more than induction.names={task.names}, of which they are made")
    config.model.vocab_size = task.names + task.words


def _polynomials(config: Study) -> None:
    task = config.polynomials
    if task.modulus < 2 or any(task.modulus % part == 0 for part in range(2, task.modulus)):
        raise UserError(f"polynomials.modulus={task.modulus} is not a prime; choose 7, for example")
    if task.beyond < task.operations:
        raise UserError(f"polynomials.beyond={task.beyond} is less than polynomials.operations={task.operations}")
    config.model.vocab_size = task.modulus + OPERATORS + 1
    longest = task.beyond + (task.beyond + 1) * task.coefficients + 1
    config.train.sequence_length = longest + task.coefficients - 1


def _heads(config: Study) -> None:
    if config.mtp.stride > 1:
        stride = config.mtp.stride
        raise UserError(f"mtp.stride={stride} leaps over tokens, and experiment={config.experiment} drafts each; choose 1")


_TASKS = {"choice_points": _choice_points, "path_star": _path_star, "induction": _induction, "polynomials": _polynomials}
