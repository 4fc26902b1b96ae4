"""Promises of the trunk: documents in one row are strangers, positions count only by their distance, a cache changes nothing."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mtp_dist.decoding.cache import KeyValues
from mtp_dist.model.attention import document_mask
from mtp_dist.model.trunk import Block, rotate, rotation
from tests.model.small import small_model

EXACT = 1e-12
"""float64: the same sums in another order."""
ANGLES = 1e-6
"""Rotary angles are float32: the same distance at other positions is the same to some units of 6e-8 of an angle below 20."""


def block() -> Block:
    chunk = small_model(0, layers=1)
    found = chunk.layers["0"]
    assert isinstance(found, Block)
    return found


def states(positions: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, positions, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def turn(positions: Tensor) -> Tensor:
    return rotation(positions, 4, 100.0)


def test_the_mask_is_causal_and_stays_in_the_document() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, -1, -1]])
    mask = document_mask(documents)
    assert mask.shape == (2, 1, 6, 6)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                assert mask[b, 0, i, j] == (j <= i and documents[b, i] == documents[b, j])


@torch.no_grad()
def test_a_masked_document_is_as_if_alone() -> None:
    """Rotary positions are relative, so a document's place in the row does not matter either."""
    layer, x = block(), states(9)
    ends = [0, 2, 3, 9]
    documents = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 2]]).expand(2, -1)
    together = layer(x, turn(torch.arange(9)), document_mask(documents))
    for begin, end in pairwise(ends):
        alone = layer(x[:, begin:end], turn(torch.arange(end - begin)), None)
        assert (together[:, begin:end] - alone).abs().max() <= ANGLES
    unmasked = layer(x, turn(torch.arange(9)), None)
    assert (together[:, 2:] - unmasked[:, 2:]).abs().amax(-1).min() > 1e-3, "the mask makes no difference here: nothing is shown"


@torch.no_grad()
def test_one_document_masked_is_plainly_causal() -> None:
    layer, x = block(), states(9)
    masked = layer(x, turn(torch.arange(9)), document_mask(torch.zeros(2, 9)))
    assert (masked - layer(x, turn(torch.arange(9)), None)).abs().max() <= EXACT
    later = x.clone()
    later[:, 5:] += 1.0
    assert layer(later, turn(torch.arange(9)), None)[:, :5].equal(layer(x, turn(torch.arange(9)), None)[:, :5])


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_scores_depend_on_the_distance_alone(shift: int) -> None:
    x = states(6).unsqueeze(1)[..., :4]
    here, there = (rotate(x, turn(torch.arange(6) + by)) for by in (0, shift))
    scores = here @ here.mT
    assert (scores - there @ there.mT).abs().max() <= 10 * ANGLES
    assert (scores - x @ x.mT).abs().max() > 1e-2, "no rotation at all would pass"


def test_rotation_keeps_lengths_and_position_zero() -> None:
    x = states(6).unsqueeze(1)[..., :4]
    turned = rotate(x, turn(torch.arange(6)))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=ANGLES)
    assert turned[:, :, 0].equal(x[:, :, 0])
    assert rotate(x.bfloat16(), turn(torch.arange(6))).dtype == torch.bfloat16


def test_rotation_in_bfloat16_is_computed_in_float32() -> None:
    """Position 300 in bfloat16 would be 300 +- 1: a wrong angle altogether."""
    x = states(1).unsqueeze(1)[..., :4].bfloat16()
    turned = rotate(x, turn(torch.tensor([301])))
    want = rotate(x.double(), turn(torch.tensor([301])))
    assert (turned.double() - want).abs().max() <= 2**-8 * x.abs().max()


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 1, 3], [1, 8]])
@torch.no_grad()
def test_with_a_cache_any_pieces_make_the_whole(pieces: list[int]) -> None:
    layer, x = block(), states(9)
    want = layer(x, turn(torch.arange(9)), None)
    cache = KeyValues(2, 2, 9, 4, dtype=torch.float64, device=torch.device("cpu"))
    got, begin = [], 0
    for size in pieces:
        new = torch.arange(begin, begin + size)
        mask = torch.arange(begin + size) <= new.unsqueeze(1)
        got.append(layer(x[:, begin : begin + size], turn(new), mask, cache))
        begin += size
    assert (torch.cat(got, dim=1) - want).abs().max() <= EXACT


@torch.no_grad()
def test_one_position_with_a_cache_needs_no_mask() -> None:
    """None with a cache means: sees everything so far."""
    layer, x = block(), states(5)
    want = layer(x, turn(torch.arange(5)), None)
    cache = KeyValues(2, 2, 5, 4, dtype=torch.float64, device=torch.device("cpu"))
    got = [layer(x[:, i : i + 1], turn(torch.tensor([i])), None, cache) for i in range(5)]
    assert (torch.cat(got, dim=1) - want).abs().max() <= EXACT
