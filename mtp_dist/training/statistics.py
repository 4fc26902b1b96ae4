"""From summed statistics of the last chunk to reported losses and accuracies, the same on every rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.model.chunk import COLUMNS
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.tracking import names


@dataclass
class Totals:
    """Sums over the global batch. `loss`: the differentiated total; `sums` [1+D, 6] float64: ``COLUMNS``; `counts` [1+D]:
    valid targets."""

    loss: float
    sums: Tensor
    counts: Tensor

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.loss + other.loss, self.sums + other.sums, self.counts + other.counts)

    def means(self) -> dict[str, list[float]]:
        """By depth 0 (main) .. D: loss, the part of it that is ``feature_loss``, the discriminator's loss, accuracy and
        conditional accuracy; 0 where nothing counts."""

        def ratio(column: str, by: Tensor) -> list[float]:
            return torch.where(by > 0, self.sums[:, COLUMNS.index(column)] / by.clamp(min=1), 0.0).tolist()

        counts = self.counts.double()
        return {
            "loss": ratio("loss_sum", counts),
            "features": ratio("feature_sum", counts),
            "adversary": ratio("adversary_sum", counts),
            "accuracy": ratio("correct", counts),
            "conditional": ratio("prefix_correct", self.sums[:, COLUMNS.index("prefix_valid")]),
        }

    def weighted(self, coefficients: list[float]) -> float:
        """The total loss from the means; depths beyond the coefficients have no part in it."""
        return sum(c * loss for c, loss in zip(coefficients, self.means()["loss"], strict=False))

    def training_metrics(self) -> dict[str, float]:
        """A depth without targets has no metrics."""
        means = self.means()
        metrics = {names.LOSS_TOTAL: self.loss, names.LOSS_MAIN: means["loss"][0], names.ACCURACY_MAIN: means["accuracy"][0]}
        for k in range(1, len(self.counts)):
            if not self.counts[k]:
                continue
            metrics[names.of_depth(names.LOSS_DEPTH, k)] = means["loss"][k]
            if any(means["features"]):
                metrics[names.of_depth(names.LOSS_FEATURES_DEPTH, k)] = means["features"][k]
            if any(means["adversary"]):
                metrics[names.of_depth(names.LOSS_ADVERSARY_DEPTH, k)] = means["adversary"][k]
            metrics[names.of_depth(names.ACCURACY_DEPTH, k)] = means["accuracy"][k]
            metrics[names.of_depth(names.ACCURACY_CONDITIONAL_DEPTH, k)] = means["conditional"][k]
        return metrics

    def validation_metrics(self, coefficients: list[float]) -> dict[str, float]:
        means = self.means()
        metrics = {
            names.VALIDATION_LOSS_TOTAL: self.weighted(coefficients),
            names.VALIDATION_LOSS_MAIN: means["loss"][0],
            names.VALIDATION_ACCURACY_MAIN: means["accuracy"][0],
        }
        for k in range(1, len(self.counts)):
            metrics[names.of_depth(names.VALIDATION_LOSS_DEPTH, k)] = means["loss"][k]
            if any(means["features"]):
                metrics[names.of_depth(names.VALIDATION_LOSS_FEATURES_DEPTH, k)] = means["features"][k]
            if any(means["adversary"]):
                metrics[names.of_depth(names.VALIDATION_LOSS_ADVERSARY_DEPTH, k)] = means["adversary"][k]
            metrics[names.of_depth(names.VALIDATION_ACCURACY_DEPTH, k)] = means["accuracy"][k]
            metrics[names.of_depth(names.VALIDATION_ACCURACY_CONDITIONAL_DEPTH, k)] = means["conditional"][k]
        return metrics


def gather(result: Tensor | None, counts: Tensor, mesh: Mesh) -> Totals:
    """Sum the last chunks' results over the world; every rank returns the same. Collective.

    Each tensor rank of a last chunk holds the same result: only the first adds it.
    """
    size = 1 + len(COLUMNS) * len(counts)
    total = torch.zeros(size, dtype=torch.float64)
    if result is not None and mesh.tensor.rank == 0:
        total += result.double().cpu()
    dist.all_reduce(total, group=mesh.control)
    return Totals(total[0].item() / mesh.parallel.data, total[1:].view(len(counts), len(COLUMNS)), counts.cpu())
