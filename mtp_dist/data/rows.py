"""A held-out split as numbered rows, in stored order: the same rows for every layout."""

from functools import partial

import numpy as np

from mtp_dist.data.batch import Batch, collate, pad
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.packing import full_rows, pack, row_length
from mtp_dist.data.reading import SampleReader
from mtp_dist.errors import UserError


class Rows:
    """Random access to the full rows of a split: row n covers positions n*S .. n*S + S + D of its documents laid end to end."""

    def __init__(self, dataset: Dataset, split: str, sequence_length: int, ahead: int) -> None:
        """Raises UserError where the split is empty or does not fill one row, ShardError where an index is wrong."""
        source = dataset.split(split)
        self._reader = SampleReader(source)
        self._sequence_length, self._length = sequence_length, row_length(sequence_length, ahead)
        self._ends = np.cumsum(self._reader.lengths())
        self._count = full_rows(int(self._ends[-1]), sequence_length, ahead)
        if not self._count:
            raise UserError(
                f"split {split!r} of {dataset.path} has {self._ends[-1]} tokens, fewer than one row of {self._length}; "
                "choose a smaller train.sequence_length, or build the dataset with a larger validation_share"
            )
        self.pad = partial(pad, eos_id=dataset.eos_id)  # pad(batch, rows)

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Batch:
        """Rows start .. stop - 1, at least one. Raises IndexError outside the split, ShardError."""
        if not 0 <= start < stop <= self._count:
            raise IndexError(f"rows {start} .. {stop - 1} of {self._count}")
        begin = start * self._sequence_length
        end = (stop - 1) * self._sequence_length + self._length
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end, side="left"))
        samples = self._reader.read(first, last + 1)
        bounds = self._ends[first : last + 1]
        base = int(self._ends[first - 1]) if first else 0
        rows = []
        for row in range(start, stop):
            position = row * self._sequence_length
            head = int(np.searchsorted(bounds, position, side="right"))
            origin = int(bounds[head - 1]) if head else base
            rows.append(pack(samples[head:], position - origin, self._length))
        return collate(rows)
