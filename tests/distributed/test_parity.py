"""Promise: every layout is the same model. Losses, gradients, gradient norm and weights equal plain autograd in one process.

Tolerance, float32: a layout only changes the order of sums of some 10^3 terms of like size, so results differ by a few units of
the last place (6e-8), magnified by cancellation in a gradient; 1e-5 of a tensor's largest element is far above that, and far
below any wrong count, missing replica or doubled gradient (10^-1 and up).
"""

from functools import cache
from typing import Any

import pytest
import torch

from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize
from tests.distributed.layouts import LAYOUTS, configuration
from tests.distributed.tasks import reference

TOLERANCE = 1e-5


@cache
def expected(layout: str) -> Any:
    return reference(layout)


def assert_slices(ranks: list[Any], whole: dict[str, torch.Tensor], key: str) -> None:
    covered = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in whole.items()}
    for result in ranks:
        for name, (shape, start, value) in result[key].items():
            assert shape == tuple(whole[name].shape)
            part = tuple(slice(begin, begin + size) for begin, size in zip(start, value.shape, strict=True))
            limit = TOLERANCE * whole[name].abs().max()
            assert (value - whole[name][part]).abs().max() <= limit, name
            covered[name][part] = True
    assert all(seen.all() for seen in covered.values()), "a part of a parameter is on no rank"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_norm(grid: Any, layout: str) -> None:
    want = expected(layout)
    for result in grid(layout):
        assert result["losses"] == pytest.approx(want["losses"], rel=TOLERANCE)
        assert result["norms"] == pytest.approx(want["norms"], rel=TOLERANCE)
        for got, right in zip(result["means"], want["means"], strict=True):
            assert got["loss"] == pytest.approx(right["loss"], rel=TOLERANCE)
            assert got["accuracy"] == pytest.approx(right["accuracy"], abs=1e-9)
            assert got["conditional"] == pytest.approx(right["conditional"], abs=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(grid: Any, layout: str) -> None:
    want = expected(layout)["gradients"]
    frozen = configuration(layout).mtp.freeze_trunk
    assert want["mtp.1.projection.weight" if frozen else "embedding.weight"].abs().max() > 1e-3
    assert not frozen or all(set(result["gradients"]) <= set(want) for result in grid(layout))
    assert_slices(grid(layout), want, "gradients")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_after_three_steps(grid: Any, layout: str) -> None:
    assert_slices(grid(layout), expected(layout)["weights"], "weights")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation(grid: Any, layout: str) -> None:
    for result in grid(layout):
        assert result["held_out"]["loss"] == pytest.approx(expected(layout)["held_out"]["loss"], rel=TOLERANCE)
        assert result["held_out"]["accuracy"] == pytest.approx(expected(layout)["held_out"]["accuracy"], abs=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_run_once_a_micro_batch(grid: Any, layout: str) -> None:
    """Torch infers shapes by running chunks on uninitialised memory unless it is told them: weight gradients would leak in."""
    for result in grid(layout):
        assert set(result["forward_calls"]) == {result["micro_batches"]}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if configuration(name).mtp.freeze_trunk])
def test_a_frozen_trunk_keeps_its_bits(grid: Any, layout: str) -> None:
    config = configuration(layout)
    whole = Chunk(config.model, config.mtp, range(config.model.layers))
    initialize(whole, config.seed)
    learned = 0
    for result in grid(layout):
        for name, (_, start, value) in result["weights"].items():
            part = tuple(slice(begin, begin + size) for begin, size in zip(start, value.shape, strict=True))
            same = value.equal(whole.get_parameter(name)[part])
            assert same != name.startswith("mtp."), name
            learned += not same
    assert learned
