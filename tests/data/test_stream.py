"""A stream reads everything once an epoch, resumes bit-identically at every step, and gives every layout the same batches."""

import json
from collections import Counter
from typing import Any

import pytest
import torch

from mtp_dist.data.batch import Batch
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.reading import SampleReader
from mtp_dist.data.stream import Stream, merge_states
from mtp_dist.errors import UserError

S, D, LANES = 48, 2, 4


def stream(dataset: Dataset, replica: int = 0, replicas: int = 1, state: Any = None, **changes: Any) -> Stream:
    settings = {"rows": 8, "sequence_length": S, "ahead": D, "lanes": LANES, "block_samples": 8, "seed": 3} | changes
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


def test_each_token_of_each_document_is_an_input_once_an_epoch(dataset: Dataset) -> None:
    """With rows of one input each, the state before a row says which epoch and which token of its document it is."""
    split = dataset.split("validation")
    stored = {sample.key: sample.tokens for sample in SampleReader(split).read(0, split.documents)}
    reading = stream(dataset, split="validation", rows=LANES, sequence_length=1, ahead=0)
    counts: Counter[tuple[int, str, int]] = Counter()
    places = reading.state["lanes"]
    while min(place["epoch"] for place in places.values()) < 2:
        batch, state = reading.next()
        for lane, place in enumerate(places.values()):
            key = batch.samples[lane][0]
            assert batch.tokens[lane, 0] == stored[key][place["token"]]
            counts[place["epoch"], key, place["token"]] += 1
        places = state["lanes"]
    for epoch in (0, 1):
        found = {place: count for place, count in counts.items() if place[0] == epoch}
        assert set(found) == {(epoch, key, token) for key, tokens in stored.items() for token in range(len(tokens))}
        assert set(found.values()) == {1}


def test_rows_are_windows_of_their_lane(dataset: Dataset) -> None:
    """Row n of a lane holds its positions n*S .. n*S + S + D, whatever S and D are."""
    tokens: list[list[int]] = [[] for _ in range(LANES)]
    single = stream(dataset, rows=LANES, sequence_length=1, ahead=0)
    for _ in range(11 * S):
        for lane, token in enumerate(single.next()[0].tokens[:, 0].tolist()):
            tokens[lane].append(token)
    packed = stream(dataset)
    for step_number in range(5):
        batch, _ = packed.next()
        for row in range(8):
            lane, number = row // 2, 2 * step_number + row % 2
            assert batch.tokens[row].tolist() == tokens[lane][number * S : number * S + S + 1 + D]


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
        ({"split": "validation", "block_samples": 4}, "split=validation differs from train"),
    ],
)
def test_a_state_of_another_order_is_refused(dataset: Dataset, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        stream(dataset, state=stream(dataset).state, **changes)


def test_an_unmerged_state_is_refused(dataset: Dataset) -> None:
    half = stream(dataset, replica=0, replicas=2).state
    with pytest.raises(UserError, match=r"lacks lanes \[2, 3\]"):
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
