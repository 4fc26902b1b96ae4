"""The state of a training stream, as a checkpoint keeps it: read strictly, and held against the order that it resumes.

    {"order": {"split": "train", ...}, "lanes": {"0": {"epoch": 0, "window": 2, "row": 17, "offset": 5}, ...}}

A checkpoint may come from anywhere, and a place that no lane can have reached would fail far from its cause, or read on for ever
in search of it. `form` needs nothing but the state; `require_reached` needs the dataset.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mtp_dist.data.lanes import MixedPosition, Order, Position
from mtp_dist.data.reading import SampleReader
from mtp_dist.json_document import FormError, typed

MOST_EPOCHS = 10**6


@dataclass(frozen=True)
class DocumentOrder:
    """What the order of documents follows from; `fingerprint` is that of the split's content."""

    split: str
    fingerprint: str
    lanes: int
    block_samples: int
    seed: int


@dataclass(frozen=True)
class MixedOrder(DocumentOrder):
    """The same for mixed rows (`data.mix_tokens`)."""

    window_blocks: int
    sequence_length: int


@dataclass(frozen=True)
class DocumentState:
    order: DocumentOrder
    lanes: dict[str, Position]


@dataclass(frozen=True)
class MixedState:
    order: MixedOrder
    lanes: dict[str, MixedPosition]


def form(state: Mapping[str, Any], place: str = "") -> DocumentState | MixedState:
    """The state with its types. `place`: what the document calls it. Raises FormError where a field is missing, unknown, of
    another type or negative, or a lane is none of the order's."""
    order = state.get("order")
    mixed = isinstance(order, dict) and "window_blocks" in order
    found: DocumentState | MixedState = typed(state, MixedState, place) if mixed else typed(state, DocumentState, place)
    prefix = f"{place}." if place else ""
    for name, position in found.lanes.items():
        # Names are those of range(lanes), so no lane is there twice under two spellings.
        if not (name.isascii() and name.isdigit() and str(int(name[:9])) == name and int(name) < found.order.lanes):
            raise FormError(f"{prefix}lanes has {name[:20]!r}, which is none of {found.order.lanes} lanes")
        for field in fields(position):
            if field.name not in state["lanes"][name]:  # new lanes begin at 0, a state says where
                raise FormError(f"{prefix}lanes.{name}.{field.name} is missing")
            if (number := getattr(position, field.name)) < 0:
                raise FormError(f"{prefix}lanes.{name}.{field.name} is {number}")
        if position.epoch > MOST_EPOCHS:
            raise FormError(f"{prefix}lanes.{name}.epoch is {position.epoch}; no run gets beyond {MOST_EPOCHS:,}")
    return found


def require_reached(
    position: Position | MixedPosition, lane: int, order: Order, reader: SampleReader, sequence_length: int
) -> None:
    """Raise FormError unless the lane can stand there."""
    if isinstance(position, Position):
        _require_document(position, lane, order, reader)
    else:
        _require_row(position, lane, order, reader, sequence_length)


def _require_document(at: Position, lane: int, order: Order, reader: SampleReader) -> None:
    blocks = order.lane_blocks(lane, at.epoch)
    _require_below(len(blocks), "blocks", f"lanes.{lane}.block", at.block)
    block = int(blocks[at.block])
    places = order.block_order(block, at.epoch)
    _require_below(len(places), "documents", f"lanes.{lane}.sample", at.sample)
    document = order.block_range(block)[0] + int(places[at.sample])
    _require_below(int(reader.lengths()[document]), "tokens", f"lanes.{lane}.token", at.token)


def _require_row(at: MixedPosition, lane: int, order: Order, reader: SampleReader, sequence_length: int) -> None:
    windows = order.windows(lane, at.epoch)
    _require_below(len(windows), "windows", f"lanes.{lane}.window", at.window)
    # A row of the window before reaches less than a row into this one.
    _require_below(sequence_length, "tokens of a row", f"lanes.{lane}.offset", at.offset)
    lengths, blocks = reader.lengths(), order.lane_blocks(lane, at.epoch)
    ranges = (order.block_range(int(blocks[number])) for number in windows[at.window])
    tokens = sum(int(lengths[first:stop].sum()) for first, stop in ranges)
    rows = max(1, -(-(tokens - at.offset) // sequence_length))  # a window too short for a row is passed over at its row 0
    _require_below(rows, "rows", f"lanes.{lane}.row", at.row)


def _require_below(count: int, what: str, name: str, value: int) -> None:
    if value >= count:
        raise FormError(f"{name} is {value}, but there are {count} {what}, counted from 0")
