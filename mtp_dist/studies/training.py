"""One training run of an experiment, in one process: the same model, loss, optimizer step and schedules as ``mtp_dist.train``."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtp_dist.config.layout import tokens_per_step
from mtp_dist.config.schema import TrainingRun
from mtp_dist.data.batch import Batch
from mtp_dist.errors import UserError
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.training.learning_rate import learning_rate
from mtp_dist.training.objective import coefficients, draws
from mtp_dist.training.statistics import Totals
from mtp_dist.training.step import Workload, build

CURVE_POINTS = 40


@dataclass
class Trained:
    """A trained model. `curve`: (step, main loss), averaged between points. `seconds`: median of the steps."""

    workload: Workload
    curve: list[list[float]]
    seconds: float


def train(
    config: TrainingRun,
    mesh: Mesh,
    read: Callable[[int], Batch],
    watch: Callable[[int, Workload], None] | None = None,
    draft_tokens: Sequence[int] | None = None,
) -> Trained:
    """Train the resolved `config` on the batches `read(0)`, `read(1)`, ..; `watch(step, workload)` sees the model before each
    step, and after the last. `draft_tokens`: as of ``Chunk``; None: the first ones, as made-up tokens are alike. Raises UserError
    where a step is not finite."""
    assert config.train.steps is not None
    listed = range(config.mtp.draft_vocabulary or 0) if draft_tokens is None else draft_tokens
    workload, size, steps = build(config, mesh, listed), tokens_per_step(config), config.train.steps
    losses, seconds = [], []
    for step in range(steps):
        if watch is not None:
            watch(step, workload)
        batch, began = read(step), time.perf_counter()
        lr = learning_rate(config.schedule, config.optim.lr, (step + 1) * size, steps * size)
        drawn = draws(config, step, step * size)
        totals, outcome = workload.step(batch, coefficients(config.mtp, step * size), lr, drawn)
        if not outcome.applied:
            raise UserError(f"step {step + 1} of seed={config.seed}: the loss is not finite; lower optim.lr={config.optim.lr:g}")
        losses.append(totals.means()["loss"][0])
        seconds.append(time.perf_counter() - began)
    if watch is not None:
        watch(steps, workload)
    return Trained(workload, thinned(losses), statistics.median(seconds))


def thinned(losses: list[float]) -> list[list[float]]:
    """About ``CURVE_POINTS`` points (step, mean loss of the steps since the last point)."""
    stride = max(1, len(losses) // CURVE_POINTS)
    parts = [losses[begin : begin + stride] for begin in range(0, len(losses) - stride + 1, stride)]
    return [[(place + 1) * stride, sum(part) / len(part)] for place, part in enumerate(parts)]


def tested(workload: Workload, batch: Batch) -> Totals:
    """Losses and accuracies on these rows, forward only."""
    return workload.evaluate(batch, len(batch), len(batch))
