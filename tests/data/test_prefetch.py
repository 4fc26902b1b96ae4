"""A prefetch gives the same batches and states as the stream itself, passes errors on in their turn, and ends when told."""

import threading

import pytest
import torch

from mtp_dist.data.batch import Batch
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.prefetch import Prefetch
from mtp_dist.data.stream import State, Stream


def stream(dataset: Dataset, state: State | None = None) -> Stream:
    sizes = {"rows": 4, "sequence_length": 32, "ahead": 1, "lanes": 4, "block_samples": 8, "mix_tokens": 4000}
    return Stream(dataset, "train", **sizes, seed=1, replica=0, replicas=1, state=state)


class Failing:
    """Two batches, then an error."""

    def __init__(self, source: Stream) -> None:
        self.source, self.left, self.closed = source, 2, False

    def next(self) -> tuple[Batch, State]:
        if not self.left:
            raise OSError("the disk is gone")
        self.left -= 1
        return self.source.next()

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("count", [1, 3])
def test_batches_and_states_are_those_of_the_stream(dataset: Dataset, count: int) -> None:
    plain, ahead = stream(dataset), Prefetch(stream(dataset), count)
    try:
        for _ in range(10):
            (left, left_state), (right, right_state) = plain.next(), ahead.next()
            assert torch.equal(left.tokens, right.tokens)
            assert left_state == right_state
    finally:
        ahead.close()


def test_a_resume_does_not_skip_what_was_only_prefetched(dataset: Dataset) -> None:
    ahead = Prefetch(stream(dataset), 3)
    for _ in range(4):
        _, state = ahead.next()
    ahead.close()
    truth = stream(dataset)
    for _ in range(4):
        truth.next()
    assert torch.equal(stream(dataset, state).next()[0].tokens, truth.next()[0].tokens)


def test_an_error_surfaces_in_its_turn_and_stays(dataset: Dataset) -> None:
    source = Failing(stream(dataset))
    ahead = Prefetch(source, 4)
    ahead.next()
    ahead.next()
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.next()
    ahead.close()
    assert source.closed


def test_close_ends_the_thread(dataset: Dataset) -> None:
    before = set(threading.enumerate())
    ahead = Prefetch(stream(dataset), 1)
    assert set(threading.enumerate()) - before
    ahead.next()
    ahead.close()
    ahead.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(RuntimeError, match="closed"):
        ahead.next()
