"""Packing keeps every token, trains each position once, and marks documents at their boundaries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.data.packing import Sample, full_rows, pack, row_length

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=20)
sizes = st.tuples(st.integers(1, 17), st.integers(0, 4))


def documents(lengths: list[int]) -> list[Sample]:
    """Tokens count up through the whole stream, so that a token is its own position."""
    ends = np.cumsum(lengths)
    return [
        Sample(f"doc-{number}", np.arange(end - length, end))
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def rows_of(samples: list[Sample], S: int, D: int) -> list:
    """All full rows, cut with a plain loop over positions."""
    ends = np.cumsum([len(sample.tokens) for sample in samples])
    rows = []
    for row in range(full_rows(int(ends[-1]), S, D)):
        head = next(number for number, end in enumerate(ends) if row * S < end)
        start = int(ends[head]) - len(samples[head].tokens)
        rows.append(pack(samples[head:], row * S - start, row_length(S, D)))
    return rows


@given(lengths, sizes)
@settings(max_examples=200, deadline=None)
def test_rows_are_consecutive_windows(lengths: list[int], sizes: tuple[int, int]) -> None:
    S, D = sizes
    for number, row in enumerate(rows_of(documents(lengths), S, D)):
        assert row.tokens.dtype == np.int64
        assert row.tokens.tolist() == list(range(number * S, number * S + S + 1 + D))


@given(lengths, sizes)
@settings(max_examples=200, deadline=None)
def test_each_position_is_an_input_once_and_no_row_is_left_over(lengths: list[int], sizes: tuple[int, int]) -> None:
    S, D = sizes
    rows = rows_of(documents(lengths), S, D)
    inputs = [token for row in rows for token in row.tokens[:S].tolist()]
    assert inputs == list(range(len(rows) * S))
    assert sum(lengths) < (len(rows) + 1) * S + 1 + D


@given(lengths, sizes)
@settings(max_examples=200, deadline=None)
def test_document_numbers_change_exactly_where_documents_do(lengths: list[int], sizes: tuple[int, int]) -> None:
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row in rows_of(documents(lengths), *sizes):
        truth = owner[row.tokens]
        assert row.documents.dtype == np.int32
        assert row.documents.tolist() == (truth - truth[0]).tolist()
        assert row.samples == [f"doc-{number}" for number in range(truth[0], truth[-1] + 1)]


@pytest.mark.parametrize(("offset", "length"), [(3, 2), (-1, 2), (0, 10)])
def test_a_row_outside_its_documents_is_an_error(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match=r"offset|fill"):
        pack(documents([3, 4]), offset, length)
