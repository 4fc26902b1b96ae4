"""Polynomial arithmetic (after Gloeckle and others, arXiv 2404.19737, section 4.2): negation, sum, product and composition of
polynomials with coefficients modulo a prime, cut off at a power of X.

An expression is written in Polish notation, its answer as coefficients, lowest first. Training rows have up to `operations`
operations; tested are these and more. Right means: all coefficients as greedy decoding writes them. The paper finds that
multi-token prediction helps, within and beyond what was trained, more than a larger model does.
"""

import random
from collections.abc import Callable

from matplotlib.figure import Figure

from mtp_dist.config.heads import lookahead
from mtp_dist.config.schema import PolynomialTask, Study
from mtp_dist.data.batch import Batch
from mtp_dist.model.chunk import Chunk
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.studies.answers import exact, question_and_answer
from mtp_dist.studies.drawing import bars
from mtp_dist.studies.experiment import Column, Experiment, Outcome
from mtp_dist.studies.results import Results
from mtp_dist.studies.training import train

Polynomial = tuple[int, ...]
"""Coefficients, lowest first."""


def negated(a: Polynomial, p: int) -> Polynomial:
    return tuple(-x % p for x in a)


def added(a: Polynomial, b: Polynomial, p: int) -> Polynomial:
    return tuple((x + y) % p for x, y in zip(a, b, strict=True))


def multiplied(a: Polynomial, b: Polynomial, p: int) -> Polynomial:
    """Powers of X from len(a) on are cut off."""
    size = len(a)
    return tuple(sum(a[i] * b[power - i] for i in range(power + 1)) % p for power in range(size))


def composed(a: Polynomial, b: Polynomial, p: int) -> Polynomial:
    """a(b(X)), by Horner's rule."""
    result = tuple(0 for _ in a)
    for x in reversed(a):
        result = added(multiplied(result, b, p), (x, *(0 for _ in a[1:])), p)
    return result


OPERATIONS: tuple[Callable[[Polynomial, Polynomial, int], Polynomial], ...] = (added, multiplied, composed)


def expression(task: PolynomialTask, operations: int, draw: random.Random) -> tuple[list[int], Polynomial]:
    """Tokens of a random expression with so many operations, and its value. Tokens: 0 .. p-1 coefficients, p negation, p+1 sum,
    p+2 product, p+3 composition."""
    p = task.modulus
    if operations == 0:
        leaf = tuple(draw.randrange(p) for _ in range(task.coefficients))
        return list(leaf), leaf
    kind = draw.randrange(1 + len(OPERATIONS))
    if kind == 0:
        inner, value = expression(task, operations - 1, draw)
        return [p, *inner], negated(value, p)
    left = draw.randrange(operations)
    one, a = expression(task, left, draw)
    other, b = expression(task, operations - 1 - left, draw)
    return [p + kind, *one, *other], OPERATIONS[kind - 1](a, b, p)


def rows(task: PolynomialTask, count: int, width: int, draw: random.Random, operations: int | None = None) -> Batch:
    """Rows of `width` tokens with so many operations each; None: 1 to task.operations."""
    questions, answers = [], []
    for _ in range(count):
        tokens, value = expression(task, operations or draw.randint(1, task.operations), draw)
        questions.append([*tokens, task.modulus + 1 + len(OPERATIONS)])
        answers.append(value)
    return question_and_answer(questions, answers, width)


def measure(config: Study, mesh: Mesh) -> Outcome:
    task = config.polynomials
    width = config.train.sequence_length + 1 + lookahead(config.mtp)
    draw = random.Random(config.seed)
    trained = train(config, mesh, lambda step: rows(task, config.train.global_batch, width, draw))
    chunk = trained.workload.pipeline.chunks[0]
    assert isinstance(chunk, Chunk)
    test = random.Random(config.seed + 1_000_000)
    numbers = {"loss": trained.curve[-1][1]}
    for operations in range(1, task.beyond + 1):
        numbers[f"right_{operations}"] = exact(chunk, rows(task, task.test_rows, width, test, operations)).float().mean().item()
    return Outcome(numbers, {"loss": trained.curve})


def notes(config: Study) -> list[str]:
    task = config.polynomials
    return [
        f"Z_{task.modulus}[X] / (X^{task.coefficients}); trained on 1 to {task.operations} operations, more is out of domain.",
        f"Guessing gives {task.modulus**-task.coefficients:.4f}.",
        f"Trained {config.train.steps} steps of {config.train.global_batch} fresh expressions; tested on {task.test_rows} with "
        "each number of operations (those with one are few: some were trained on).",
    ]


def draw(results: Results) -> Figure:
    shown = [column for column in EXPERIMENT.columns if column.key.startswith("right")]
    return bars(results, shown, "Polynomial arithmetic: share of right answers")


EXPERIMENT = Experiment(
    "Do heads that predict further ahead make small models calculate better?",
    (
        *(
            Column(f"right_{count}", f"right, {count} operation{'s' if count > 1 else ''}", compared=True)
            for count in range(1, 7)
        ),
        Column("loss", "main loss at the end"),
    ),
    measure,
    draw,
    notes,
)
