"""Promise: what is reported is what was differentiated: the means of all depths, weighted, are the loss; a loss on features is
tracked beside the loss of its depth, in training and validation."""

from typing import Any

import pytest

from mtp_dist.config.heads import learns_inside
from mtp_dist.model.chunk import COLUMNS
from mtp_dist.model.targets import targets, valid_counts
from mtp_dist.training.objective import coefficients, target_scale
from mtp_dist.training.statistics import Totals
from tests.model.small import rows, small_model
from tests.model.test_sequential import settings

KINDS: list[dict[str, Any]] = [
    {"kind": "sequential"},
    {"kind": "eagle"},
    {"kind": "eagle", "h0": "pre_norm", "cross_entropy_weight": 0.7, "targets": "trunk"},
    {"kind": "eagle3"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(part) for part in kind.values()))
def test_the_total_is_the_weighted_sum_of_what_is_tracked(kind: dict[str, Any]) -> None:
    chunk = small_model(2, **kind)
    mtp = settings(chunk, depth_weights=[1.0, 0.5], normalize="sum", **kind)
    tokens, documents = rows(2)
    counts, parts = valid_counts(targets(tokens, documents, 2, inside=learns_inside(mtp))), coefficients(mtp, 0)
    scale = target_scale(parts, counts, replicas=1).expand(len(tokens), -1)
    out = chunk(tokens=tokens, documents=documents, scale=scale).detach()
    totals = Totals(out[0].item(), out[1:].view(3, len(COLUMNS)).double(), counts)
    assert totals.weighted(parts) == pytest.approx(totals.loss, rel=1e-6)
    training, validation = totals.training_metrics(), totals.validation_metrics(parts)
    assert training["loss/total"] == totals.loss
    for k in (1, 2):
        names = [f"loss_features/depth_{k}", f"validation/loss_features_depth_{k}"]
        if mtp.kind != "eagle":
            assert not {*names} & {*training, *validation}
            continue
        assert 0 < training[names[0]] == validation[names[1]] < training[f"loss/depth_{k}"]
