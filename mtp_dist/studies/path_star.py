"""Path-star graphs (Bachmann and Nagarajan, arXiv 2403.06963): does a head that looks further make the trunk plan?

The question lists the edges of a star of arms in random order, the common node, and the goal, the end of one arm; the answer
is the path. Taught token by token, all but the first node follow from the node before (an edge to look up), and the first
one, the only choice, is left to guessing: 1/degree. Right means: the whole path as greedy decoding writes it.

Labels and edges are drawn anew for each row, so nothing can be memorised. Unlike the paper's, the answer leaves the common
node out: the first token is the choice.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mtp_dist.config.heads import lookahead
from mtp_dist.config.schema import PathStarTask, Study
from mtp_dist.data.batch import Batch
from mtp_dist.data.packing import PADDING
from mtp_dist.model.chunk import Chunk
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.studies.answers import exact, right
from mtp_dist.studies.drawing import curves
from mtp_dist.studies.experiment import Column, Experiment, Outcome
from mtp_dist.studies.results import Results
from mtp_dist.studies.training import train
from mtp_dist.training.step import Workload

TESTS = 20
"""Tests during training."""


def graphs(task: PathStarTask, count: int, width: int, generator: torch.Generator) -> Batch:
    """Rows of `width` tokens: edges as pairs (nearer node, farther node), common node, goal, sign, path, padding."""
    arms, length = task.degree, task.length
    labels = torch.rand(count, task.nodes, generator=generator).argsort(1)[:, : 1 + arms * length]
    common, nodes = labels[:, :1], labels[:, 1:].view(count, arms, length)
    nearer = torch.cat((common.unsqueeze(1).expand(-1, arms, 1), nodes[:, :, :-1]), dim=2)
    edges = torch.stack((nearer, nodes), dim=-1).view(count, arms * length, 2)
    order = torch.rand(count, arms * length, generator=generator).argsort(1)
    edges = edges.gather(1, order.unsqueeze(-1).expand(-1, -1, 2)).flatten(1)
    path = nodes[:, 0]  # which arm is the first is as random as the labels
    sign = torch.full((count, 1), task.nodes)
    question = torch.cat((edges, common, path[:, -1:], sign), dim=1)
    answer = path.flip(1) if task.reverse else path
    tokens = torch.zeros(count, width, dtype=torch.int64)
    documents = torch.full((count, width), PADDING, dtype=torch.int32)
    begin, end = question.shape[1], question.shape[1] + length
    tokens[:, :end] = torch.cat((question, answer), dim=1)
    documents[:, begin - 1 : end] = 0
    return Batch(tokens, documents, [[] for _ in range(count)])


def solved(task: PathStarTask, question: list[int]) -> list[int]:
    """The path, found by walking the edges back from the goal: what a right answer is."""
    *edges, common, goal, _ = question
    before = dict(zip(edges[1::2], edges[::2], strict=True))
    path = [goal]
    while before[path[-1]] != common:
        path.append(before[path[-1]])
    return path if task.reverse else path[::-1]


def measure(config: Study, mesh: Mesh) -> Outcome:
    task, steps = config.path_star, config.train.steps
    assert steps is not None
    width = config.train.sequence_length + 1 + lookahead(config.mtp)
    generator = torch.Generator().manual_seed(config.seed)
    held_out = graphs(task, task.test_rows, width, torch.Generator().manual_seed(config.seed + 1_000_000))
    found: list[list[float]] = []

    def watch(step: int, workload: Workload) -> None:
        if step % max(1, steps // TESTS) == 0:
            found.append([step, exact(_chunk(workload), held_out).float().mean().item()])

    trained = train(config, mesh, lambda step: graphs(task, config.train.global_batch, width, generator), watch)
    chunk = _chunk(trained.workload)
    ok, first = right(chunk, held_out), 2 * task.degree * task.length + 2
    return Outcome(
        {
            "exact": exact(chunk, held_out).float().mean().item(),
            "first": ok[:, first].float().mean().item(),
            "later": _mean(ok[:, first + 1 : first + task.length]),
            "loss": trained.curve[-1][1],
        },
        {"exact": found, "loss": trained.curve},
    )


def notes(config: Study) -> list[str]:
    task = config.path_star
    return [
        f"{task.degree} arms of {task.length} nodes among {task.nodes} labels; guessing the arm gives {1 / task.degree:.3f}.",
        f"Each run saw {config.train.steps} x {config.train.global_batch} graphs, none twice by design, and was tested on "
        f"{task.test_rows} others.",
        "Right: the trunk's greedy answer, without drafts; the heads only taught it.",
    ]


def draw(results: Results) -> Figure:
    guess = 1 / results.config.path_star.degree
    return curves(results, "exact", "share of paths that are right", "Path-star graphs", (guess, "guessing the arm"))


def _chunk(workload: Workload) -> Chunk:
    chunk = workload.pipeline.chunks[0]
    assert isinstance(chunk, Chunk)
    return chunk


def _mean(values: Tensor) -> float:
    return values.float().mean().item() if values.numel() else 1.0


EXPERIMENT = Experiment(
    "Do heads that predict further ahead make the trunk choose the right arm?",
    (
        Column("exact", "whole path right", compared=True),
        Column("first", "first node right (the choice)"),
        Column("later", "later nodes right, given those before"),
        Column("loss", "main loss at the end"),
    ),
    measure,
    draw,
    notes,
)
