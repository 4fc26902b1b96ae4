"""Training data without an end: batches, and after each the state from which the next one follows.

Row r of a global batch comes from lane r // (rows / lanes), and replica d owns rows d*rows/replicas .. (d+1)*rows/replicas,
so a replica reads whole lanes and the global batch does not depend on how many replicas share it. A state is JSON and knows
no layout: where each lane stands (`lanes.Position`, `lanes.MixedPosition`) and which order that place belongs to.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtp_dist.config.heads import lookahead
from mtp_dist.config.schema import TrainingRun
from mtp_dist.data.batch import Batch, collate
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.lanes import MixedPosition, Order, Position, check_layout, lanes_of_replica
from mtp_dist.data.mixing import MixedLane
from mtp_dist.data.packing import Row, Sample, pack, row_length
from mtp_dist.data.reading import SampleReader
from mtp_dist.data.stream_state import form, require_reached
from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError

State = dict[str, Any]


class StateError(UserError):
    """The state to resume from is none that a stream has been in. `what`: the field and its value."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the data state to resume from is damaged ({what}); use another checkpoint")
        self.what = what


class Lane:
    """One endless sequence of documents, cut into rows in the order of the documents (`data.mix_tokens=0`)."""

    def __init__(
        self, reader: SampleReader, order: Order, lane: int, position: Position, sequence_length: int, length: int
    ) -> None:
        self._reader, self._order, self._lane = reader, order, lane
        self._sequence_length, self._length = sequence_length, length
        self._documents = self._walk(position)
        self._pending: deque[tuple[Position, Sample]] = deque()  # read, but not yet trained to their end
        self._offset = position.token
        self._start = position

    @property
    def position(self) -> Position:
        """Where the next row starts."""
        if not self._pending:
            return self._start
        place = self._pending[0][0]
        return Position(place.epoch, place.block, place.sample, self._offset)

    def row(self) -> Row:
        """The next row; the lane then stands `sequence_length` tokens further."""
        available = sum(len(sample.tokens) for _, sample in self._pending) - self._offset
        while available < self._length:
            place, sample = next(self._documents)
            self._pending.append((place, sample))
            available += len(sample.tokens)
        row = pack([sample for _, sample in self._pending], self._offset, self._length)
        self._offset += self._sequence_length
        # At least the 1 + D targets stay pending, so a lane always stands inside a document.
        while self._offset >= (read := len(self._pending[0][1].tokens)):
            self._offset -= read
            self._pending.popleft()
        return row

    def _walk(self, at: Position) -> Iterator[tuple[Position, Sample]]:
        """Documents from `at` on, epoch after epoch."""
        epoch, first_block, first_sample = at.epoch, at.block, at.sample
        while True:
            blocks = self._order.lane_blocks(self._lane, epoch)
            for number in range(first_block, len(blocks)):
                block = int(blocks[number])
                stored = self._reader.read(*self._order.block_range(block))
                shuffled = self._order.block_order(block, epoch)
                for place in range(first_sample, len(shuffled)):
                    yield Position(epoch, number, place), stored[shuffled[place]]
                first_sample = 0
            epoch, first_block = epoch + 1, 0


class Stream:
    """The batches of one replica. `state` resumes behind an earlier batch; it may cover more lanes than this replica's."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        rows: int,
        sequence_length: int,
        ahead: int,
        lanes: int,
        block_samples: int,
        mix_tokens: int,
        seed: int,
        replica: int,
        replicas: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`rows`: of the global batch; this replica's batches hold rows / replicas. `mix_tokens`: tokens that all lanes together
        keep open for mixing rows; 0: rows in the order of the documents. Raises UserError where things do not fit,
        StateError where a stream cannot have had the state."""
        check_layout(rows, lanes, replicas)
        source = dataset.split(split)
        order = Order.of(
            source.documents, source.tokens, lanes=lanes, block_samples=block_samples, mix_tokens=mix_tokens, seed=seed
        )
        self._identity = {
            "split": split,
            "fingerprint": source.fingerprint,
            "lanes": order.lanes,
            "block_samples": order.block_samples,
            "seed": order.seed,
        }
        if mix_tokens:
            self._identity |= {"window_blocks": order.window_blocks, "sequence_length": sequence_length}
        places = {} if state is None else _places(state, self._identity)
        mine = lanes_of_replica(lanes, replica, replicas)
        if state is not None and (missing := [lane for lane in mine if lane not in places]):
            raise StateError(f"lanes lack {', '.join(map(str, missing[:8]))}; a state holds all replicas' lanes")
        reader, cut = SampleReader(source), (sequence_length, row_length(sequence_length, ahead))
        self._lanes: dict[int, Lane | MixedLane] = {}
        for lane in mine:
            place = places.get(lane) or (MixedPosition() if mix_tokens else Position())
            try:
                require_reached(place, lane, order, reader, sequence_length)
            except FormError as error:
                raise StateError(str(error)) from None
            if isinstance(place, MixedPosition):
                self._lanes[lane] = MixedLane(reader, order, lane, place, *cut)
            else:
                self._lanes[lane] = Lane(reader, order, lane, place, *cut)
        self._rows_per_lane = rows // lanes

    @property
    def state(self) -> State:
        """Where the next batch starts; covers this replica's lanes."""
        places = {str(lane): reading.position.to_json() for lane, reading in self._lanes.items()}
        return {"order": dict(self._identity), "lanes": places}

    def next(self) -> tuple[Batch, State]:
        """This replica's rows of the next global batch, and the state after it. Raises ShardError."""
        rows = [lane.row() for lane in self._lanes.values() for _ in range(self._rows_per_lane)]
        return collate(rows), self.state

    def close(self) -> None:
        """Nothing to end; here so that a Stream and a Prefetch are used alike."""


def merge_states(states: Sequence[Mapping[str, Any]]) -> State:
    """One state out of those of all replicas after the same step; raises ValueError where they contradict each other."""
    lanes: dict[str, Any] = {}
    for state in states:
        if state["order"] != states[0]["order"]:
            raise ValueError("data states of different orders cannot be merged")
        for lane, place in state["lanes"].items():
            if lanes.setdefault(lane, place) != place:
                raise ValueError(f"data states disagree about lane {lane}")
    return {"order": dict(states[0]["order"]), "lanes": {lane: lanes[lane] for lane in sorted(lanes, key=int)}}


def _places(state: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[int, Position | MixedPosition]:
    """Where each lane stands; raises UserError where the state belongs to another order than this stream's."""
    try:
        found = form(state)
    except FormError as error:
        raise StateError(str(error)) from None
    settings = {
        "fingerprint": "the dataset's content",
        "lanes": "data.lanes",
        "block_samples": "data.block_samples (as used)",
        "window_blocks": "the number of blocks mixed together (data.mix_tokens)",
        "sequence_length": "train.sequence_length",
    }
    before = state["order"]
    for name in identity | before:
        if before.get(name) != identity.get(name):
            raise UserError(
                f"{settings.get(name, name)}={identity.get(name, 0)} differs from {before.get(name, 0)} of the run to resume, "
                "so its data order is lost; restore the setting, or start a new run"
            )
    return {int(lane): place for lane, place in found.lanes.items()}


def training_stream(
    dataset: Dataset, config: TrainingRun, replica: int, replicas: int, state: Mapping[str, Any] | None = None
) -> Stream:
    """The batches of a run's replica, as its settings say."""
    return Stream(
        dataset,
        "train",
        rows=config.train.global_batch,
        sequence_length=config.train.sequence_length,
        ahead=lookahead(config.mtp),
        lanes=config.data.lanes,
        block_samples=config.data.block_samples,
        mix_tokens=config.data.mix_tokens,
        seed=config.seed,
        replica=replica,
        replicas=replicas,
        state=state,
    )
