"""Promise: every layout is the same model. Losses, gradients, gradient norm, weights and evaluation equal plain autograd in one
process, within the tolerance of the dtype (see ``comparison``)."""

from typing import Any

import pytest
import torch

from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize
from tests.distributed.cells import CELLS, is_ordinary
from tests.distributed.comparison import beyond, covered, expected
from tests.distributed.layouts import configuration


def cells(**wanted: Any) -> list[Any]:
    """The cells that have these settings."""
    return [
        pytest.param(name, id=name, marks=() if is_ordinary(name) else pytest.mark.full)
        for name, settings in CELLS.items()
        if wanted.items() <= settings.items()
    ]


@pytest.mark.parametrize("cell", cells())
def test_losses_and_norm(grid: Any, cell: str) -> None:
    assert beyond(grid(cell), CELLS[cell], "loss", "accuracy", "norm", "later_norm") == {}


@pytest.mark.parametrize("cell", cells())
def test_gradients(grid: Any, cell: str) -> None:
    want = expected(CELLS[cell])["gradients"]
    frozen = CELLS[cell].get("freeze_trunk", False)
    largest = {name: gradient.abs().max() for name, gradient in want.items()}
    assert max(size for name, size in largest.items() if name.startswith("mtp.1." if frozen else "embedding.")) > 1e-3
    assert not frozen or all(set(result["gradients"]) <= set(want) for result in grid(cell))
    assert covered(grid(cell), want, "gradients")
    assert beyond(grid(cell), CELLS[cell], "gradient") == {}


@pytest.mark.parametrize("cell", cells())
def test_weights_after_three_steps(grid: Any, cell: str) -> None:
    """What the model computes with, and the float32 masters behind it."""
    want = expected(CELLS[cell])["weights"]
    assert covered(grid(cell), want, "weights")
    assert beyond(grid(cell), CELLS[cell], "weight", "master") == {}


@pytest.mark.parametrize("cell", cells())
def test_copies_have_the_same_bits(grid: Any, cell: str) -> None:
    """Of whatever several ranks hold: norms, shared key/value heads, the embedding of a classic pipeline. A difference in the
    last bit would grow from step to step, unseen."""
    first: dict[tuple[Any, ...], torch.Tensor] = {}
    for result in grid(cell):
        for name, start, shape, begin, value in result["masters"]:
            assert first.setdefault(("master", name, start, shape, begin, len(value)), value).equal(value), name
        for name, (_, start, value) in result["weights"].items():
            assert first.setdefault(("weight", name, start, value.shape), value).equal(value), name


@pytest.mark.parametrize("cell", cells())
def test_chunks_run_once_a_micro_batch(grid: Any, cell: str) -> None:
    """Torch infers shapes by running chunks on uninitialised memory unless it is told them: weight gradients would leak in."""
    for result in grid(cell):
        assert set(result["forward_calls"]) == {result["micro_batches"]}


@pytest.mark.parametrize("cell", cells(dtype="bfloat16"))
def test_weights_are_rounded_masters(grid: Any, cell: str) -> None:
    for result in grid(cell):
        for name, _, shape, begin, master in result["masters"]:
            weight = result["weights"][name][2]
            assert (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, shape)
            assert weight.flatten()[begin : begin + len(master)].equal(master.bfloat16())


@pytest.mark.parametrize("cell", cells(freeze_trunk=True))
def test_a_frozen_trunk_keeps_its_bits(grid: Any, cell: str) -> None:
    config = configuration(CELLS[cell])
    whole = Chunk(config.model, config.mtp, range(config.model.layers))
    initialize(whole, config.seed)
    whole.to(getattr(torch, config.train.dtype))
    learned = 0
    for result in grid(cell):
        for name, (_, start, value) in result["weights"].items():
            part = tuple(slice(begin, begin + size) for begin, size in zip(start, value.shape, strict=True))
            same = value.equal(whole.get_parameter(name)[part])
            # In bfloat16 a small tensor may round to what it was.
            assert same or name.startswith(("mtp.", "adversary.")), name
            assert not same or not name.startswith("mtp.") or config.train.dtype == "bfloat16", name
            learned += not same
    assert learned
