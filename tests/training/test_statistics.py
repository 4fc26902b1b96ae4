"""Promise: a depth that no target counts for has no number in the metrics, and no part in a total."""

import torch

from mtp_dist.model.chunk import COLUMNS
from mtp_dist.training.statistics import Totals


def test_a_depth_without_targets_has_no_metrics() -> None:
    sums = torch.zeros(3, len(COLUMNS), dtype=torch.float64)
    sums[:, COLUMNS.index("loss_sum")] = torch.tensor([8.0, 6.0, 0.0])
    totals = Totals(loss=3.0, sums=sums, counts=torch.tensor([4, 2, 0]))
    metrics = totals.training_metrics()
    assert (metrics["loss/main"], metrics["loss/depth_1"]) == (2.0, 3.0)
    assert not [name for name in metrics if name.endswith("depth_2")]
    assert totals.weighted([1.0, 0.5]) == 3.5
    assert totals.weighted([1.0]) == 2.0
