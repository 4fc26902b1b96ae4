"""Promise: depth k at i wants t[i+1+k s], and it counts exactly where tokens i .. i+1+k s lie in one document; for heads that
learn from the trunk's state at i+k, only where there is one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.model.targets import IGNORE, targets, valid_counts


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], int, int]:
    """Rows of whole documents, of padding, and of documents with padding behind; D, and a stride."""
    depth, positions, rows = draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    stride = draw(st.integers(1, 3))
    width = positions + 1 + depth * stride
    tokens = [[draw(st.integers(0, 50)) for _ in range(width)] for _ in range(rows)]
    documents = []
    for _ in range(rows):
        row, number = [], 0
        used = draw(st.integers(0, width))
        for i in range(width):
            number += i > 0 and draw(st.booleans())
            row.append(number if i < used else -1)
        documents.append(row)
    return tokens, documents, depth, stride


@given(batches(), st.booleans())
@settings(deadline=None, max_examples=200)
def test_equals_the_definition(batch: tuple[list[list[int]], list[list[int]], int, int], inside: bool) -> None:
    tokens, documents, depth, stride = batch
    inside = inside and stride == 1
    got = targets(torch.tensor(tokens), torch.tensor(documents, dtype=torch.int32), depth, stride=stride, inside=inside)
    positions = len(tokens[0]) - 1 - depth * stride
    assert got.shape == (len(tokens), positions, 1 + depth)
    assert got.dtype == torch.int64
    counts = [0] * (1 + depth)
    for b, (row, owners) in enumerate(zip(tokens, documents, strict=True)):
        for i in range(positions):
            for k in range(1 + depth):
                one_document = owners[i] >= 0 and all(owners[j] == owners[i] for j in range(i, i + 2 + k * stride))
                counted = one_document and (i + k < positions or not inside)
                assert got[b, i, k] == (row[i + 1 + k * stride] if counted else IGNORE)
                counts[k] += counted
    assert valid_counts(got).tolist() == counts


def test_every_position_of_a_whole_row_has_all_its_targets() -> None:
    """The row carries S + 1 + D tokens: nothing is lost at its end."""
    got = targets(torch.arange(9).unsqueeze(0), torch.zeros(1, 9, dtype=torch.int32), 2)
    assert got[0].tolist() == [[i + 1, i + 2, i + 3] for i in range(6)]


def test_a_leap_skips_tokens() -> None:
    got = targets(torch.arange(11).unsqueeze(0), torch.zeros(1, 11, dtype=torch.int32), 2, stride=3)
    assert got[0].tolist() == [[i + 1, i + 4, i + 7] for i in range(4)]


def test_token_zero_is_a_target_like_any_other() -> None:
    got = targets(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int32), 1)
    assert valid_counts(got).tolist() == [2, 2]
