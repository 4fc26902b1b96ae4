"""Induction (after Gloeckle and others, arXiv 2404.19737, section 4.1): does the second token of a name follow the first,
once seen?

The paper takes children's stories with names of two tokens. Here a row is made of words that follow a fixed random table, and
of names: two tokens drawn anew for each row. At its first mention a name's second token cannot be known; at every later one
it can be copied. Measured: the trunk's accuracy there, during training. The paper finds that two-token prediction makes small
models learn this sooner, and that larger ones need no help.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mtp_dist.config.heads import lookahead
from mtp_dist.config.schema import InductionTask, Study
from mtp_dist.data.batch import Batch
from mtp_dist.model.chunk import Chunk
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.studies.answers import next_tokens
from mtp_dist.studies.drawing import curves
from mtp_dist.studies.experiment import Column, Experiment, Outcome
from mtp_dist.studies.results import Results
from mtp_dist.studies.training import train
from mtp_dist.training.step import Workload

TESTS = 20
FOLLOWERS = 3
"""Words that may follow a word."""
TABLE_SEED = 11


def rows(task: InductionTask, count: int, width: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """Rows of `width` tokens, words 0 .. words-1 and name tokens behind them; and where a name's second token can be known: bool
    [count, width], at the token itself."""
    table = torch.randint(task.words, (task.words, FOLLOWERS), generator=torch.Generator().manual_seed(TABLE_SEED))
    words = torch.empty(count, width, dtype=torch.int64)
    words[:, 0] = torch.randint(task.words, (count,), generator=generator)
    picks = torch.randint(FOLLOWERS, (count, width), generator=generator)
    for at in range(1, width):
        words[:, at] = table[words[:, at - 1], picks[:, at]]
    # First tokens of a row's names differ, so that the first one says whose name it is.
    first = torch.rand(count, task.names, generator=generator).argsort(1)[:, : task.people]
    second = torch.randint(task.names, (count, task.people), generator=generator)
    who = torch.randint(task.people, (count, task.mentions), generator=generator)
    # A name starts at an even place, so that no two overlap.
    places = 2 * torch.rand(count, width // 2, generator=generator).argsort(1)[:, : task.mentions].sort(1).values
    known = torch.zeros(count, width, dtype=torch.bool)
    seen = torch.zeros(count, task.people, dtype=torch.bool)
    every = torch.arange(count)
    for mention in range(task.mentions):
        person, place = who[:, mention], places[:, mention]
        words[every, place] = task.words + first[every, person]
        words[every, place + 1] = task.words + second[every, person]
        known[every, place + 1] = seen[every, person]
        seen[every, person] = True
    return Batch(words, torch.zeros(count, width, dtype=torch.int32), [[] for _ in range(count)]), known


def accuracy(model: Chunk, tokens: Tensor, known: Tensor) -> float:
    """Of the trunk, on the second tokens that can be known."""
    right = next_tokens(model, tokens)[:, :-1] == tokens[:, 1:]
    return right[known[:, 1:]].float().mean().item()


def measure(config: Study, mesh: Mesh) -> Outcome:
    task, steps = config.induction, config.train.steps
    assert steps is not None
    width = config.train.sequence_length + 1 + lookahead(config.mtp)
    generator = torch.Generator().manual_seed(config.seed)
    held_out, known = rows(task, task.test_rows, width, torch.Generator().manual_seed(config.seed + 1_000_000))
    found: list[list[float]] = []

    def watch(step: int, workload: Workload) -> None:
        if step % max(1, steps // TESTS) == 0:
            chunk = workload.pipeline.chunks[0]
            assert isinstance(chunk, Chunk)
            found.append([step, accuracy(chunk, held_out.tokens, known)])

    trained = train(config, mesh, lambda step: rows(task, config.train.global_batch, width, generator)[0], watch)
    chunk = trained.workload.pipeline.chunks[0]
    assert isinstance(chunk, Chunk)
    values = [value for _, value in found]
    return Outcome(
        {
            "induction": accuracy(chunk, held_out.tokens, known),
            "area": sum(values) / len(values),
            "loss": trained.curve[-1][1],
        },
        {"induction": found, "loss": trained.curve},
    )


def notes(config: Study) -> list[str]:
    task = config.induction
    return [
        f"Names of two of {task.names} tokens, {task.people} in a row, {task.mentions} mentions; guessing gives "
        f"{1 / task.names:.3f}.",
        f"Trained {config.train.steps} steps of {config.train.global_batch} fresh rows; tested on {task.test_rows} others.",
        "Mean over training: of the accuracy at evenly spaced steps; larger means learned sooner.",
    ]


def draw(results: Results) -> Figure:
    guess = 1 / results.config.induction.names
    return curves(results, "induction", "second token of a known name right", "Induction", (guess, "guessing"))


EXPERIMENT = Experiment(
    "Do heads that predict further ahead make small models learn induction sooner?",
    (
        Column("induction", "second token right", compared=True),
        Column("area", "mean over training", compared=True),
        Column("loss", "main loss at the end"),
    ),
    measure,
    draw,
    notes,
)
