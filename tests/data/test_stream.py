"""A stream reads everything once an epoch, resumes bit-identically at every step, and gives every layout the same batches."""

import json
from collections import Counter
from typing import Any

import pytest
import torch

from mtp_dist.data.batch import Batch
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.lanes import Order
from mtp_dist.data.packing import Sample
from mtp_dist.data.reading import SampleReader
from mtp_dist.data.stream import Stream, merge_states
from mtp_dist.errors import UserError

S, D, LANES = 48, 2, 4
MIXED = 14_000  # tokens: a window is two of a lane's six blocks


@pytest.fixture(params=[0, MIXED, 10**9], ids=["documents", "windows", "whole"], autouse=True)
def mix(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every promise holds for rows in the order of the documents, and mixed in windows or over the whole split."""
    monkeypatch.setitem(SETTINGS, "mix_tokens", request.param)
    value: int = request.param
    return value


SETTINGS = {"rows": 8, "sequence_length": S, "ahead": D, "lanes": LANES, "block_samples": 8, "seed": 3}


def stream(dataset: Dataset, replica: int = 0, replicas: int = 1, state: Any = None, **changes: Any) -> Stream:
    settings = SETTINGS | changes
    return Stream(dataset, settings.pop("split", "train"), replica=replica, replicas=replicas, state=state, **settings)


def same(left: Batch, right: Batch) -> bool:
    tensors = torch.equal(left.tokens, right.tokens) and torch.equal(left.documents, right.documents)
    return tensors and left.samples == right.samples


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.documents for part in parts]),
        [row for part in parts for row in part.samples],
    )


def step(streams: list[Stream]) -> tuple[Batch, dict[str, Any]]:
    """One global batch of all replicas, and the merged state after it, through JSON as a checkpoint keeps it."""
    results = [replica.next() for replica in streams]
    return joined([batch for batch, _ in results]), json.loads(json.dumps(merge_states([state for _, state in results])))


def replicas_of(dataset: Dataset, replicas: int, state: Any = None, **changes: Any) -> list[Stream]:
    return [stream(dataset, replica, replicas, state, **changes) for replica in range(replicas)]


def test_shapes_and_types(dataset: Dataset) -> None:
    batch, _ = stream(dataset, replica=1, replicas=2).next()
    assert batch.tokens.shape == batch.documents.shape == (4, S + 1 + D)
    assert (batch.tokens.dtype, batch.documents.dtype) == (torch.int64, torch.int32)
    assert len(batch.samples) == 4


def laid_out(dataset: Dataset, order: Order, lane: int, epochs: int) -> list[tuple[int, str, int, int]]:
    """(epoch, key, place in the document, token) of every token of a lane, in the order of its documents; written plainly."""
    reader = SampleReader(dataset.split("train"))
    found = []
    for epoch in range(epochs):
        for block in order.lane_blocks(lane, epoch).tolist():
            start, stop = order.block_range(block)
            stored = reader.read(start, stop)
            for place in order.block_order(block, epoch).tolist():
                found += [(epoch, stored[place].key, at, int(t)) for at, t in enumerate(stored[place].tokens)]
    return found


def expected_rows(dataset: Dataset, lane: int, epochs: int, mix_tokens: int) -> list[list[tuple[int, str, int, int]]]:
    """A lane's rows, as docs/data-format.md describes their order."""
    split = dataset.split("train")
    order = Order.of(split.documents, split.tokens, lanes=LANES, block_samples=8, mix_tokens=mix_tokens, seed=3)
    tokens = laid_out(dataset, order, lane, epochs)
    windows = [tokens[start : start + S + 1 + D] for start in range(0, len(tokens) - S - D, S)]
    if not mix_tokens:
        return windows
    rows, begin, number = [], 0, 0
    for epoch in range(epochs - 1):
        for window, places in enumerate(order.windows(lane, epoch)):
            blocks = order.lane_blocks(lane, epoch)[places.start : places.stop].tolist()
            begin += int(SampleReader(split).lengths()[[n for block in blocks for n in range(*order.block_range(block))]].sum())
            stop = -(-begin // S)  # rows that start before the window's end
            rows += [windows[number + row] for row in order.row_order(lane, epoch, window, stop - number).tolist()]
            number = stop
    return rows


def test_rows_are_those_of_the_documented_order(dataset: Dataset, mix: int) -> None:
    """More than an epoch of every lane, row by row: tokens, documents, keys."""
    reading = stream(dataset, rows=LANES)
    rows = [expected_rows(dataset, lane, 3, mix) for lane in range(LANES)]
    for number in range(min(map(len, rows))):
        batch, _ = reading.next()
        for lane in range(LANES):
            row = rows[lane][number]
            assert batch.tokens[lane].tolist() == [token for *_, token in row]
            keys = list(dict.fromkeys((epoch, key) for epoch, key, *_ in row))
            assert batch.samples[lane] == [key for _, key in keys]
            assert batch.documents[lane].tolist() == [keys.index((epoch, key)) for epoch, key, *_ in row]


def test_each_token_of_each_document_is_an_input_once_an_epoch(dataset: Dataset, mix: int) -> None:
    split = dataset.split("train")
    stored = Counter((key, at) for sample in SampleReader(split).read(0, split.documents) for key, at in positions(sample))
    rows = [row for lane in range(LANES) for row in expected_rows(dataset, lane, 3, mix)]
    inputs = Counter((key, at) for row in rows for epoch, key, at, _ in row[:S] if epoch == 0)
    assert inputs == stored


def positions(sample: Sample) -> list[tuple[str, int]]:
    return [(sample.key, at) for at in range(len(sample.tokens))]


def test_a_step_holds_no_neighbours(dataset: Dataset, mix: int) -> None:
    """Mixed rows of one step lie apart in the documents; in the order of the documents they are next to each other."""
    places = {}
    for lane in range(LANES):
        for number, row in enumerate(expected_rows(dataset, lane, 1, 0)):
            places[tuple(token for *_, token in row), tuple(dict.fromkeys(key for _, key, *_ in row))] = (lane, number)
    reading = stream(dataset)
    split = dataset.split("train")
    order = Order.of(split.documents, split.tokens, lanes=LANES, block_samples=8, mix_tokens=0, seed=3)
    steps = min(len(laid_out(dataset, order, lane, 1)) for lane in range(LANES)) // (2 * S) - 1  # of the first epoch
    touching = 0
    for _ in range(steps):
        batch, _ = reading.next()
        rows = [(tuple(batch.tokens[row].tolist()), tuple(batch.samples[row])) for row in range(8)]
        found = [places[row] for row in rows if row in places]  # all but one that reaches into the second epoch
        touching += sum((lane, number + 1) in found for lane, number in found)
    assert touching == 4 * steps if not mix else touching <= steps // 10


def test_documents_change_after_each_end_token_only(dataset: Dataset) -> None:
    reading = stream(dataset)
    boundaries = 0
    for _ in range(30):
        batch, _ = reading.next()
        changes = batch.documents[:, 1:] - batch.documents[:, :-1]
        ends = (batch.tokens[:, :-1] == dataset.eos_id).to(torch.int32)
        assert torch.equal(changes, ends)
        assert not batch.documents[:, 0].any()
        boundaries += int(ends.sum())
        for row in range(len(batch)):
            assert len(batch.samples[row]) == int(batch.documents[row, -1]) + 1
    assert boundaries > 20


def test_resume_is_bit_identical_at_every_step(dataset: Dataset) -> None:
    """More than an epoch, so that states at its end and beginning are among them."""
    reading = stream(dataset)
    states, batches = [reading.state], []
    while states[-1]["lanes"]["0"]["epoch"] < 2:
        batch, state = reading.next()
        batches.append(batch)
        states.append(json.loads(json.dumps(state)))
    for number, state in enumerate(states[:-1]):
        again = stream(dataset, state=state)
        assert again.state == state
        batch, after = again.next()
        assert same(batch, batches[number])
        assert after == states[number + 1]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_global_batches_do_not_depend_on_replicas(dataset: Dataset, replicas: int) -> None:
    one, several = [stream(dataset)], replicas_of(dataset, replicas)
    for _ in range(12):
        left, state = step(one)
        right, merged = step(several)
        assert same(left, right)
        assert state == merged


def test_replicas_may_change_at_a_resume(dataset: Dataset) -> None:
    truth = stream(dataset)
    state = None
    for replicas in (1, 2, 4, 2, 1):
        streams = replicas_of(dataset, replicas, state)
        for _ in range(5):
            batch, state = step(streams)
            assert same(batch, truth.next()[0])


def test_the_global_batch_may_change_at_a_resume(dataset: Dataset) -> None:
    """Every lane goes on where it stood: after 3 batches of 8 rows and 2 of 16, each lane has given the same 14 rows."""
    small, large = [stream(dataset)], None
    state = None
    rows: list[list[torch.Tensor]] = [[] for _ in range(LANES)]
    for _ in range(3):
        batch, state = step(small)
        for lane in range(LANES):
            rows[lane] += list(batch.tokens[2 * lane : 2 * lane + 2])
    large = replicas_of(dataset, 2, state, rows=16)
    for _ in range(2):
        batch, _ = step(large)
        for lane in range(LANES):
            rows[lane] += list(batch.tokens[4 * lane : 4 * lane + 4])
    truth = stream(dataset, rows=LANES)
    for number in range(14):
        batch, _ = truth.next()
        assert all(torch.equal(batch.tokens[lane], rows[lane][number]) for lane in range(LANES))


def test_another_seed_is_another_order(dataset: Dataset) -> None:
    assert stream(dataset).next()[0].samples != stream(dataset, seed=4).next()[0].samples


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lanes": 8}, r"data\.lanes=8 differs from 4"),
        ({"seed": 4}, "seed=4 differs from 3"),
        ({"block_samples": 4}, r"data\.block_samples.*=4 differs from 8"),
        ({"mix_tokens": 3000}, r"data\.mix_tokens.* differs from"),
        ({"split": "validation", "block_samples": 4}, "split=validation differs from train"),
    ],
)
def test_a_state_of_another_order_is_refused(dataset: Dataset, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        stream(dataset, state=stream(dataset).state, **changes)


def test_an_unmerged_state_is_refused(dataset: Dataset) -> None:
    half = stream(dataset, replica=0, replicas=2).state
    with pytest.raises(UserError, match="lanes lack 2, 3"):
        stream(dataset, state=half)


def test_states_that_disagree_do_not_merge(dataset: Dataset) -> None:
    reading = stream(dataset)
    before = reading.state
    after = reading.next()[1]
    with pytest.raises(ValueError, match="disagree about lane 0"):
        merge_states([before, after])
    with pytest.raises(ValueError, match="different orders"):
        merge_states([before, stream(dataset, seed=5).state])


def test_blocks_shrink_where_lanes_would_stay_empty(dataset: Dataset) -> None:
    assert stream(dataset, block_samples=10_000).state["order"]["block_samples"] == dataset.split("train").documents // LANES


def test_more_lanes_than_documents_name_the_setting(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"data\.lanes=512"):
        stream(dataset, rows=512, lanes=512)
