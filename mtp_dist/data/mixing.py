"""A lane whose rows are mixed: neighbouring rows of a step come from different documents.

Training rows in the order of the documents costs loss: a step then holds a few long documents, and the next step the same ones.
So a lane opens a window of several blocks, lays their documents end to end, and hands out the rows in random order. The order
is a function of (seed, epoch, lane, window) and of the documents' lengths; a place in it is four integers.

    blocks of the lane    | b0 | b1 | b2 | b3 | b4 | b5 | ...
    windows               |   window 0   |   window 1   | ...
    rows (S tokens each)  |--|--|--|--|--|--|--|--|--|- ...      row 5, row 1, row 9, ...

A row that starts in a window belongs to it; the last ones reach into the next window. While a window is handed out, the next one
is read block by block, so no step waits for a whole window.
"""

from collections.abc import Iterator

import numpy as np

from mtp_dist.data.lanes import MixedPosition, Order
from mtp_dist.data.packing import Row, Sample, pack
from mtp_dist.data.reading import SampleReader


class MixedLane:
    """An endless sequence of rows of `length` tokens, one starting every `sequence_length` tokens of the lane's documents."""

    def __init__(
        self, reader: SampleReader, order: Order, lane: int, position: MixedPosition, sequence_length: int, length: int
    ) -> None:
        self._reader, self._order, self._lane = reader, order, lane
        self._sequence_length, self._length = sequence_length, length
        self._blocks: dict[tuple[int, int], list[Sample]] = {}  # read, but of no open window yet
        self._position = position
        self._opened = False

    @property
    def position(self) -> MixedPosition:
        """Where the next row is."""
        return self._position

    def row(self) -> Row:
        """The next row. Raises ShardError."""
        if not self._opened:
            self._open()
        at = self._position
        start = at.offset + int(self._rows[at.row]) * self._sequence_length
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, start + self._length, side="left"))
        begin = int(self._ends[first - 1]) if first else 0
        row = pack(self._documents[first : last + 1], start - begin, self._length)
        self._position = MixedPosition(at.epoch, at.window, at.row + 1, at.offset)
        self._read_ahead()
        if self._position.row == len(self._rows):
            self._opened = False
            self._position = self._next_window(at.offset + len(self._rows) * self._sequence_length - self._tokens)
        return row

    def _open(self) -> None:
        """Read the window of the position; one too short for a row to start in it is passed over."""
        while True:
            at = self._position
            places = self._order.windows(self._lane, at.epoch)[at.window]
            self._documents = [document for number in places for document in self._block(at.epoch, number)]
            for number in places:
                del self._blocks[at.epoch, number]
            self._tokens = sum(len(document.tokens) for document in self._documents)
            rows = max(0, -(-(self._tokens - at.offset) // self._sequence_length))
            if rows:
                break
            self._position = self._next_window(at.offset - self._tokens)
        self._rows = self._order.row_order(self._lane, at.epoch, at.window, rows)
        self._append_tail(at.offset + (rows - 1) * self._sequence_length + self._length - self._tokens)
        self._ends = np.cumsum([len(document.tokens) for document in self._documents])
        upcoming = self._next_window(0)
        places = self._order.windows(self._lane, upcoming.epoch)[upcoming.window]
        self._upcoming = [(upcoming.epoch, number) for number in places]
        self._opened = True

    def _append_tail(self, missing: int) -> None:
        """Add the documents after the window that its last rows reach into."""
        for epoch, number in self._blocks_after_window():
            for document in self._block(epoch, number):
                if missing <= 0:
                    return
                self._documents.append(document)
                missing -= len(document.tokens)

    def _blocks_after_window(self) -> Iterator[tuple[int, int]]:
        at = self._position
        number = self._order.windows(self._lane, at.epoch)[at.window].stop
        epoch = at.epoch
        while True:
            for place in range(number, len(self._order.lane_blocks(self._lane, epoch))):
                yield epoch, place
            epoch, number = epoch + 1, 0

    def _next_window(self, offset: int) -> MixedPosition:
        at = self._position
        if at.window + 1 < len(self._order.windows(self._lane, at.epoch)):
            return MixedPosition(at.epoch, at.window + 1, 0, offset)
        return MixedPosition(at.epoch + 1, 0, 0, offset)

    def _read_ahead(self) -> None:
        """Read as large a share of the next window's blocks as of this window's rows were handed out."""
        due = -(-len(self._upcoming) * self._position.row // len(self._rows))
        for epoch, number in self._upcoming[:due]:
            self._block(epoch, number)

    def _block(self, epoch: int, number: int) -> list[Sample]:
        """The documents of the lane's `number`-th block of `epoch`, in their order; read once, kept until the window opens."""
        if (epoch, number) not in self._blocks:
            block = int(self._order.lane_blocks(self._lane, epoch)[number])
            stored = self._reader.read(*self._order.block_range(block))
            self._blocks[epoch, number] = [stored[place] for place in self._order.block_order(block, epoch)]
        return self._blocks[epoch, number]
