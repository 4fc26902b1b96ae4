"""Choice points: how much of the training signal is about the one step that has to be planned.

Rows walk a known path, take one of several branches, and walk on along a known path. Of S transitions one is hard. Next-token
prediction gives it one of S loss terms. With n heads that do not see the tokens between (parallel, Medusa), every target
behind the choice is as uncertain when predicted from before it: n(n+1)/2 of n S terms. A sequential module is fed the true
token before its target, so for it only the hard transition itself is hard: n of n S terms.

Counted by the rule, then measured: loss terms that are still uncertain after training, and the share of the trunk's gradient
(norm of the hard terms' gradient over the sum of both norms, for single rows) before and after training.
"""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mtp_dist.config.heads import reads_tokens
from mtp_dist.config.schema import Study
from mtp_dist.config.study import MOST_DEPTH
from mtp_dist.data.batch import Batch
from mtp_dist.data.packing import PADDING
from mtp_dist.model.targets import targets, valid_counts
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.studies.drawing import bars
from mtp_dist.studies.experiment import Column, Experiment, Outcome
from mtp_dist.studies.results import Results
from mtp_dist.studies.training import tested, train
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import Workload


def rows(config: Study, count: int, generator: torch.Generator) -> Batch:
    """Rows of S+1+D tokens; each branch has tokens of its own, so that the branch is known from any token behind the choice."""
    task, width = config.choice_points, config.train.sequence_length + 1 + config.mtp.depth
    behind = config.train.sequence_length + MOST_DEPTH - task.choice
    branch = torch.randint(task.branches, (count, 1), generator=generator)
    place = torch.arange(width).expand(count, -1)
    tokens = torch.where(place <= task.choice, place, place + branch * behind)
    return _one_document(tokens)


@dataclass(frozen=True)
class Terms:
    """The loss terms (i, k) of a row: position i predicts token i+k+1 at depth k."""

    positions: int
    depth: int
    choice: int
    fed: bool
    """Whether depth k is fed the true tokens up to i+k."""

    def hard_span(self, depth: int) -> tuple[int, int]:
        """First and last token of the windows i .. i+k+1 of the hard terms at one depth: those that cross the choice; of
        heads that are fed, those that end right behind it."""
        return self.choice - depth, self.choice + 1 + (0 if self.fed else depth)

    def marked(self, tokens: Tensor, first: int, last: int) -> Batch:
        """Only windows inside tokens first .. last count."""
        documents = torch.full(tokens.shape, PADDING, dtype=torch.int32)
        documents[:, first : last + 1] = 0
        return Batch(tokens, documents, [[] for _ in tokens])

    def hard_share(self) -> float:
        """Of all terms, by the model's own rule of what a valid target is."""
        tokens = torch.zeros(1, self.positions + 1 + self.depth, dtype=torch.int64)
        hard = 0
        for k in range(self.depth + 1):
            batch = self.marked(tokens, *self.hard_span(k))
            hard += int(valid_counts(targets(batch.tokens, batch.documents, self.depth))[k])
        return hard / (self.positions * (self.depth + 1))

    def uncertain(self, workload: Workload, tokens: Tensor, bound: float) -> int:
        """Terms whose mean loss on these rows is above the bound."""
        found = 0
        for i in range(self.positions):
            for k in range(self.depth + 1):
                totals = tested(workload, self.marked(tokens, i, i + k + 1))
                found += totals.means()["loss"][k] > bound
        return found


def gradient_share(workload: Workload, terms: Terms, tokens: Tensor, parts: list[float]) -> float:
    """Mean over rows: norm of the trunk's gradient from the hard terms, as a share of that and the norm from all others. `parts`:
    weight of the loss of each depth."""
    shares = []
    scale = torch.tensor(parts) / terms.positions
    for row in tokens.split(1):
        hard = torch.zeros(())
        for k in range(terms.depth + 1):
            only = torch.zeros_like(scale)
            only[k] = scale[k]
            hard = hard + trunk_gradient(workload, terms.marked(row, *terms.hard_span(k)), only)
        rest = trunk_gradient(workload, _one_document(row), scale) - hard
        shares.append((hard.norm() / (hard.norm() + rest.norm())).item())
    return sum(shares) / len(shares)


def trunk_gradient(workload: Workload, batch: Batch, scale: Tensor) -> Tensor:
    """Flat gradient of embedding, blocks and final norm; `scale` [1+D]: weight of a target at each depth. Leaves none behind."""
    device = workload.mesh.device
    rows = {"tokens": batch.tokens, "documents": batch.documents, "scale": scale.expand(len(batch), -1)}
    workload.pipeline.step({name: tensor.to(device) for name, tensor in rows.items()})
    parameters = dict(workload.pipeline.chunks[0].named_parameters())
    found = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu()
        for name, p in parameters.items()
        if not name.startswith("mtp.")
    ]
    for p in parameters.values():
        p.grad = None
    return torch.cat(found)


def measure(config: Study, mesh: Mesh) -> Outcome:
    task = config.choice_points
    generator = torch.Generator().manual_seed(config.seed)
    terms = Terms(config.train.sequence_length, config.mtp.depth, task.choice, reads_tokens(config.mtp))
    held_out = rows(config, task.rows, torch.Generator().manual_seed(config.seed + 1_000_000)).tokens
    parts, steps = coefficients(config.mtp, 0), config.train.steps
    shares: list[list[float]] = []

    def watch(step: int, workload: Workload) -> None:
        if step in (0, steps):
            shares.append([step, gradient_share(workload, terms, held_out, parts)])

    trained = train(config, mesh, lambda step: rows(config, config.train.global_batch, generator), watch)
    count = terms.positions * (terms.depth + 1)
    uncertain = terms.uncertain(trained.workload, held_out, math.log(task.branches) / 2)
    return Outcome(
        {
            "terms": count,
            "hard": terms.hard_share(),
            "uncertain": uncertain / count,
            "gradient_begin": shares[0][1],
            "gradient_end": shares[-1][1],
            "loss": trained.curve[-1][1],
        },
        {"loss": trained.curve},
    )


def notes(config: Study) -> list[str]:
    task, transitions = config.choice_points, config.train.sequence_length
    return [
        f"{transitions} transitions, one hard: the path after token {task.choice} is one of {task.branches}. The best possible "
        f"main loss is ln({task.branches}) / {transitions} = {math.log(task.branches) / transitions:.4f}.",
        f"For comparison: 1/{transitions} = {1 / transitions:.3f}; with n = 3 heads n(n+1)/2 of n x {transitions} = "
        f"{6 / (3 * transitions):.3f}.",
        "A term counts as still uncertain if its mean loss after training is above half of the choice's entropy.",
        "Gradient: of embedding, blocks and final norm, one row at a time, mean over rows; the heads' own weights are left out.",
    ]


def draw(results: Results) -> Figure:
    return bars(results, EXPERIMENT.columns[1:5], "Share of the training signal that is about the hard transition")


def _one_document(tokens: Tensor) -> Batch:
    return Batch(tokens, torch.zeros(tokens.shape, dtype=torch.int32), [[] for _ in tokens])


EXPERIMENT = Experiment(
    "How much of the training signal is about the hard transition?",
    (
        Column("terms", "loss terms", 0),
        Column("hard", "hard terms, by rule"),
        Column("uncertain", "terms still uncertain after training", compared=True),
        Column("gradient_begin", "gradient share of hard terms, before training", compared=True),
        Column("gradient_end", "gradient share of hard terms, after training", compared=True),
        Column("loss", "main loss at the end", 4),
    ),
    measure,
    draw,
    notes,
)
