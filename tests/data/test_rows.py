"""Validation rows are the split in stored order, whichever rows are read together."""

import numpy as np
import pytest
import torch

from mtp_dist.data.dataset import Dataset
from mtp_dist.data.reading import SampleReader
from mtp_dist.data.rows import Rows
from mtp_dist.errors import UserError


@pytest.mark.parametrize(("S", "D"), [(1, 0), (48, 2), (300, 4)])
def test_rows_are_windows_of_the_stored_order(dataset: Dataset, S: int, D: int) -> None:
    split = dataset.split("validation")
    samples = SampleReader(split).read(0, split.documents)
    whole = np.concatenate([sample.tokens for sample in samples]).astype(np.int64)
    owner = np.repeat(np.arange(len(samples)), [len(sample.tokens) for sample in samples])
    rows = Rows(dataset, "validation", S, D)
    assert len(whole) == split.tokens
    assert len(rows) == (len(whole) - 1 - D) // S
    chosen = range(len(rows)) if S > 1 else range(0, len(rows), 97)
    for row in chosen:
        batch = rows.read(row, row + 1)
        window = slice(row * S, row * S + S + 1 + D)
        assert batch.tokens[0].tolist() == whole[window].tolist()
        assert batch.documents[0].tolist() == (owner[window] - owner[row * S]).tolist()
        assert batch.samples[0] == [sample.key for sample in samples[owner[row * S] : owner[window.stop - 1] + 1]]


@pytest.mark.parametrize("together", [2, 3, 7])
def test_reading_more_rows_at_once_changes_nothing(dataset: Dataset, together: int) -> None:
    rows = Rows(dataset, "validation", 32, 2)
    for start in range(0, len(rows) - together + 1, together):
        batch = rows.read(start, start + together)
        for number in range(together):
            alone = rows.read(start + number, start + number + 1)
            assert torch.equal(batch.tokens[number], alone.tokens[0])
            assert torch.equal(batch.documents[number], alone.documents[0])
            assert batch.samples[number] == alone.samples[0]


def test_padding_rows_are_marked(dataset: Dataset) -> None:
    rows = Rows(dataset, "validation", 32, 2)
    batch = rows.pad(rows.read(0, 3), 5)
    assert torch.equal(batch.tokens[:3], rows.read(0, 3).tokens)
    assert (batch.documents[3:] == -1).all()
    assert (batch.documents[:3] >= 0).all()
    assert (batch.tokens[3:] == dataset.eos_id).all()
    assert batch.samples[3:] == [[], []]
    assert (batch.tokens.dtype, batch.documents.dtype) == (torch.int64, torch.int32)
    with pytest.raises(ValueError, match="does not fit"):
        rows.pad(rows.read(0, 3), 2)


def test_rows_outside_are_an_error(dataset: Dataset) -> None:
    rows = Rows(dataset, "validation", 32, 2)
    for start, stop in [(0, len(rows) + 1), (-1, 2), (3, 3)]:
        with pytest.raises(IndexError):
            rows.read(start, stop)


def test_a_split_shorter_than_a_row_is_named(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"sequence_length"):
        Rows(dataset, "validation", 10_000_000, 2)
