"""Preallocated memory of a batch whose rows differ in length: keys and values of attention layers, and hidden states.

A ``Span`` says which positions of each row a pass runs over. Rows with fewer positions than the longest are filled up with copies
of their last one; what is computed from a copy goes to a place that nobody reads. Rolling back is free: entries behind a row's
length stay in memory until they are overwritten, and no position ever sees beyond itself.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class Span:
    """Positions begin[b] .. end[b] - 1 of each row b; a row may have none.

    width: the most of any row; total: the largest end. positions int64 [B, width] on ``device``: copies of the last one fill
    shorter rows up. inside bool [B, width]: which are no copies; None where all rows are alike.
    """

    def __init__(self, begin: list[int], end: list[int], device: torch.device) -> None:
        self.begin, self.end = begin, end
        self.counts = [e - b for b, e in zip(begin, end, strict=True)]
        self.width, self.total = max(self.counts), max(end)
        self.even = min(begin) == max(begin) and min(end) == self.total
        if self.even:
            self.positions = torch.arange(begin[0], end[0], device=device).expand(len(begin), -1)
            self.inside: Tensor | None = None
        else:
            first, behind = torch.tensor([begin, end], device=device).unsqueeze(-1)
            steps = first + torch.arange(self.width, device=device)
            self.inside = steps < behind
            self.positions = torch.minimum(steps, behind - 1).clamp(min=0)
        self._places: dict[int, Tensor] = {}

    def read(self, x: Tensor, ahead: int = 0) -> Tensor:
        """x [B, total, ..] -> [B, width, ..]: its entries ``ahead`` of the positions."""
        if self.even:
            return x[:, self.begin[0] + ahead : self.end[0] + ahead]
        return x[self.rows, self.positions + ahead]

    @cached_property
    def rows(self) -> Tensor:
        """int64 [B, 1]: 0 .. B-1."""
        return torch.arange(len(self.begin), device=self.positions.device).unsqueeze(1)

    def last(self, x: Tensor) -> Tensor:
        """x [B, width, ..], made at the positions -> [B, ..]: that of each row's last."""
        if self.even:
            return x[:, -1]
        places = torch.tensor([max(count - 1, 0) for count in self.counts], device=x.device)
        return x[torch.arange(len(x), device=x.device), places]

    def places(self, capacity: int) -> Tensor:
        """int64 [B, width]: where entries are written; copies go to the place behind the capacity."""
        if self.inside is None:
            return self.positions
        if capacity not in self._places:  # each layer asks
            self._places[capacity] = self.positions.where(self.inside, capacity)
        return self._places[capacity]


class Rows:
    """A tensor [B, ..] of which rows leave and others join, with as few copies as can be: ``rows`` are the first of those that
    there is memory for."""

    def __init__(self, rows: Tensor) -> None:
        self.memory = self.rows = rows

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on, in this order. None is copied that stays in its place; those that move must move down to be
        copied one by one."""
        if any(row < place for place, row in enumerate(rows)):
            self.memory = self.rows = self.rows[rows]
            return
        for place, row in enumerate(rows):
            if row > place:
                self.memory[place] = self.memory[row]
        self.rows = self.memory[: len(rows)]

    def join(self, other: "Rows") -> None:
        """The rows of another one of the same sizes go on behind these, in memory that others have left where there is some."""
        count = len(self.rows) + len(other.rows)
        if count > len(self.memory):
            self.memory = torch.cat((self.rows, other.rows))
        else:
            self.memory[len(self.rows) : count] = other.rows
        self.rows = self.memory[:count]


@dataclass
class Traffic:
    """Bytes of keys and values that went into caches and came out of them, of each row of a batch.

    Counted from shapes: a pass writes its width, of drafts too that are rejected later, and reads all positions up to the longest
    row's end, once. Rows of a batch share their shapes, so each has as much.
    """

    written: int = 0
    read: int = 0

    def take(self) -> "Traffic":
        """What was counted since the last call."""
        taken = Traffic(self.written, self.read)
        self.written = self.read = 0
        return taken


class KeyValues:
    """Keys and values of one attention layer, or of several in a row: [B, K, capacity, c] each; ``lengths``: how many positions
    each row holds. ``traffic``: where its bytes are counted; caches may share it."""

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layers: int = 1,
        traffic: Traffic | None = None,
    ) -> None:
        self.traffic = Traffic() if traffic is None else traffic
        self.entry = 2 * layers * heads * head_dim * dtype.itemsize  # bytes of a position
        # Not empty memory: what is masked out is multiplied by 0, and must be finite. One more place takes the copies.
        shape = (batch, heads, capacity + 1, head_dim)
        self.memory = [Rows(torch.zeros(shape, dtype=dtype, device=device)) for _ in range(2 * layers)]
        self._changed()
        self.capacity = capacity
        self.lengths = [0] * batch

    def at(self, span: Span) -> "Extension":
        """What a block, or several in a row, take as their ``KeyValueCache`` for one pass over the span, which follows the
        lengths."""
        extension = Extension(self, span)
        self.traffic.written += span.width * self.entry
        self.traffic.read += span.total * self.entry
        return extension

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, K, n, c] to every row; returns all keys and values [B, K, total, c]. IndexError beyond the capacity."""
        end = [length + key.shape[2] for length in self.lengths]
        return self.at(Span(self.lengths, end, key.device)).extend(key, value)

    def crop(self, lengths: list[int]) -> None:
        """Forget every entry of row b from position lengths[b] on; a shorter row stays as it is."""
        self.lengths = cropped(self.lengths, lengths)

    def pick(self, first: list[int], slots: Tensor) -> None:
        """Entry j of row b, counted from first[b], becomes what entry slots[b, j] is. slots int64 [B, n]."""
        self.traffic.written += slots.shape[1] * self.entry
        self.traffic.read += slots.shape[1] * self.entry
        begin = torch.tensor(first, device=slots.device).unsqueeze(1)
        rows, source = torch.arange(len(first), device=slots.device).unsqueeze(1), begin + slots
        target = begin + torch.arange(slots.shape[1], device=slots.device)
        for memory in (*self.keys, *self.values):
            memory[rows, :, target] = memory[rows, :, source]

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on, in this order."""
        for memory in self.memory:
            memory.keep(rows)
        self._changed()
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, other: "KeyValues") -> None:
        """The rows of another cache of the same sizes go on behind these."""
        for own, new in zip(self.memory, other.memory, strict=True):
            own.join(new)
        self._changed()
        self.lengths = self.lengths + other.lengths

    def _changed(self) -> None:
        """Tensors [B, K, capacity + 1, c] of the rows as they are now, one a layer."""
        layers = len(self.memory) // 2
        self.keys, self.values = ([part.rows for part in half] for half in (self.memory[:layers], self.memory[layers:]))


class Extension:
    """One pass's writing to a cache, by one layer after the other. It is the model's ``KeyValueCache``."""

    def __init__(self, cache: KeyValues, span: Span) -> None:
        assert span.begin == cache.lengths
        if span.total > cache.capacity:
            raise IndexError(f"{span.total} positions do not fit a cache of {cache.capacity}")
        self.cache, self.span, self.layer = cache, span, 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, K, width, c] as the next layer's; returns views of all its keys and values [B, K, total, c]."""
        keys, values, span = self.cache.keys[self.layer], self.cache.values[self.layer], self.span
        if span.even:
            keys[:, :, span.begin[0] : span.total] = key
            values[:, :, span.begin[0] : span.total] = value
        else:
            places = span.places(self.cache.capacity)
            keys[span.rows, :, places] = key.transpose(1, 2)
            values[span.rows, :, places] = value.transpose(1, 2)
        self.layer += 1
        self.cache.lengths = list(span.end)
        return keys[:, :, : span.total], values[:, :, : span.total]


class HiddenStates:
    """Hidden states [B, capacity, d] by position, which a lagging MTP module still has to read."""

    def __init__(self, batch: int, capacity: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = Rows(torch.zeros(batch, capacity + 1, width, dtype=dtype, device=device))
        self.capacity = capacity
        self.lengths = [0] * batch

    @property
    def states(self) -> Tensor:
        """[B, capacity + 1, d]."""
        return self.memory.rows

    def write(self, span: Span, states: Tensor) -> None:
        """states [B, >= width, d] of the span's positions; what follows the width is not read. Raises IndexError where positions
        between would be missing."""
        if any(begin > length for begin, length in zip(span.begin, self.lengths, strict=True)):
            raise IndexError(f"positions from {span.begin} do not follow {self.lengths}")
        if span.even:
            self.states[:, span.begin[0] : span.total] = states[:, : span.width]
        else:
            self.states[span.rows, span.places(self.capacity)] = states[:, : span.width]
        self.lengths = list(span.end)

    def read(self, span: Span) -> Tensor:
        """[B, width, d]. Raises IndexError for a position that was not written, or is forgotten."""
        if any(end > length for end, length in zip(span.end, self.lengths, strict=True)):
            raise IndexError(f"positions up to {span.end} are not all there; there are {self.lengths}")
        return span.read(self.states)

    def crop(self, lengths: list[int]) -> None:
        """Forget positions of row b from lengths[b] on."""
        self.lengths = cropped(self.lengths, lengths)

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on, in this order."""
        self.memory.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, other: "HiddenStates") -> None:
        """The rows of others of the same sizes go on behind these."""
        self.memory.join(other.memory)
        self.lengths = self.lengths + other.lengths


def cropped(lengths: list[int], most: list[int]) -> list[int]:
    """Each length, or the most if that is less; never below 0."""
    return [min(length, max(bound, 0)) for length, bound in zip(lengths, most, strict=True)]
