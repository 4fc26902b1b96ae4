"""Promise: the total is lambda_0 L_main + lambda / D * sum_k w_k L_k (or lambda * sum); a target's weight follows from global
counts."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.config.schema import MTPConfig
from mtp_dist.training.objective import coefficients, depth_in_force, loss_weight, target_scale


def test_lambda_changes_at_its_points() -> None:
    """DeepSeek-V3's schedule: 0.3, from 10 T tokens on 0.1; here with a third value."""
    mtp = MTPConfig(loss_weight=0.3, loss_weight_points=[[1000.0, 0.1], [2000.0, 0.0]])
    seen = {tokens: loss_weight(mtp, tokens) for tokens in (0, 999, 1000, 1001, 1999, 2000, 10**15)}
    assert seen == {0: 0.3, 999: 0.3, 1000: 0.1, 1001: 0.1, 1999: 0.1, 2000: 0.0, 10**15: 0.0}
    assert loss_weight(MTPConfig(loss_weight=0.7), 10**12) == 0.7


def test_lambda_moves_on_straight_lines_between_points() -> None:
    mtp = MTPConfig(loss_weight=0.3, loss_weight_points=[[1000.0, 0.1], [2000.0, 0.5]], loss_weight_shape="linear")
    seen = [loss_weight(mtp, tokens) for tokens in (0, 250, 500, 1000, 1750, 2000, 10**15)]
    assert seen == pytest.approx([0.3, 0.25, 0.2, 0.1, 0.4, 0.5, 0.5], rel=1e-12)
    assert loss_weight(MTPConfig(loss_weight=0.7, loss_weight_shape="linear"), 10**12) == 0.7
    warm_up = MTPConfig(loss_weight=0.0, loss_weight_points=[[100.0, 1.0]], loss_weight_shape="linear")
    assert [loss_weight(warm_up, tokens) for tokens in (0, 50, 100, 101)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings_", "want"),
    [
        ({"depth": 2, "normalize": "mean"}, [1.0, 0.15, 0.15]),
        ({"depth": 2, "normalize": "sum"}, [1.0, 0.3, 0.3]),
        ({"depth": 3, "normalize": "mean", "depth_weights": [1.0, 0.6, 0.36]}, [1.0, 0.1, 0.06, 0.036]),
        ({"depth": 3, "normalize": "sum", "depth_weights": [1.0, 0.0, 2.0]}, [1.0, 0.3, 0.0, 0.6]),
        ({"depth": 3, "normalize": "sum", "decay": 0.5}, [1.0, 0.3, 0.15, 0.075]),
        ({"depth": 3, "normalize": "weights", "decay": 0.6, "loss_weight": 1.96}, [1.0, 1.0, 0.6, 0.36]),
        ({"depth": 2, "normalize": "weights", "depth_weights": [3.0, 1.0], "loss_weight": 1.0}, [1.0, 0.75, 0.25]),
        ({"depth": 0, "kind": "none", "normalize": "weights"}, [1.0]),
        ({"depth": 1}, [1.0, 0.3]),
        ({"depth": 0, "kind": "none"}, [1.0]),
        ({"depth": 0, "kind": "none", "normalize": "sum"}, [1.0]),
    ],
)
def test_weights_of_the_losses(settings_: dict[str, object], want: list[float]) -> None:
    mtp = MTPConfig(**settings_)  # type: ignore[arg-type]
    assert coefficients(mtp, 0) == pytest.approx(want, rel=1e-12)


def test_weights_follow_lambda() -> None:
    mtp = MTPConfig(depth=2, loss_weight_points=[[5.0, 0.1]])
    assert coefficients(mtp, 4) == pytest.approx([1.0, 0.15, 0.15])
    assert coefficients(mtp, 5) == pytest.approx([1.0, 0.05, 0.05])


def test_depths_come_and_go_at_their_points() -> None:
    """Forward from one to three, then reverse; a mean is over the depths in force."""
    mtp = MTPConfig(depth=3, decay=0.5, curriculum=[[0.0, 1], [100.0, 3], [200.0, 2], [300.0, 0]])
    assert [depth_in_force(mtp, tokens) for tokens in (0, 99, 100, 199, 200, 299, 300, 10**15)] == [1, 1, 3, 3, 2, 2, 0, 0]
    assert [depth_in_force(MTPConfig(depth=3, curriculum=[[50.0, 1]]), tokens) for tokens in (0, 49, 50)] == [3, 3, 1]
    assert depth_in_force(MTPConfig(depth=3), 10**12) == 3
    assert coefficients(mtp, 0) == pytest.approx([1.0, 0.3])
    assert coefficients(mtp, 100) == pytest.approx([1.0, 0.1, 0.05, 0.025])
    assert coefficients(mtp, 200) == pytest.approx([1.0, 0.15, 0.075])
    assert coefficients(mtp, 300) == [1.0]
    mtp.normalize = "weights"
    assert coefficients(mtp, 200) == pytest.approx([1.0, 0.2, 0.1])
    mtp.decay, mtp.depth_weights = 1.0, [0.0, 1.0, 1.0]
    assert coefficients(mtp, 0) == [1.0, 0.0]


def test_a_depth_that_is_off_weighs_nothing() -> None:
    assert target_scale([1.0, 0.5], torch.tensor([4, 2, 8]), 2).tolist() == [0.5, 0.5, 0.0]


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**9)), min_size=1, max_size=6), st.integers(1, 512))
@settings(deadline=None)
def test_the_valid_targets_of_a_depth_weigh_its_coefficient_together(depths: list[tuple[float, int]], replicas: int) -> None:
    """Times the replicas, over which ZeRO averages. A depth without targets weighs nothing, and nothing is NaN."""
    parts, counts = [part for part, _ in depths], [count for _, count in depths]
    scale = target_scale(parts, torch.tensor(counts), replicas)
    assert scale.dtype == torch.float32
    assert scale.isfinite().all()
    for weight, part, count in zip(scale.tolist(), parts, counts, strict=True):
        assert weight * count == pytest.approx(part * replicas if count else 0.0, rel=1e-6, abs=1e-30)
        assert count > 0 or weight == 0.0


def test_the_main_loss_has_a_weight_that_follows_the_tokens() -> None:
    points: dict[str, Any] = {"main_loss_weight": 0.5, "main_loss_weight_points": [[100.0, 1.5]]}
    assert coefficients(MTPConfig(depth=2, **points), 0) == pytest.approx([0.5, 0.15, 0.15])
    assert coefficients(MTPConfig(depth=2, **points), 100) == pytest.approx([1.5, 0.15, 0.15])
    assert coefficients(MTPConfig(depth=2, loss_weight_shape="linear", **points), 50) == pytest.approx([1.0, 0.15, 0.15])
    assert coefficients(MTPConfig(kind="none", depth=0, **points), 0) == [0.5]
