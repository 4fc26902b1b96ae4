"""The order of the data depends on the seed alone and gives every document to exactly one lane."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.data.lanes import Order, check_layout, lanes_of_replica, permutation
from mtp_dist.errors import UserError

PINNED = [2, 1, 0, 3, 4, 7, 5, 6]  # of 8, seed ("blocks", 1234, 0)


@given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_lanes_share_out_the_documents_of_an_epoch(documents: int, lanes: int, block: int, seed: int, epoch: int) -> None:
    documents += lanes
    order = Order.of(documents, lanes, block, seed)
    read: list[int] = []
    for lane in range(lanes):
        blocks = order.lane_blocks(lane, epoch)
        assert len(blocks)
        for number in blocks.tolist():
            start, stop = order.block_range(number)
            within = order.block_order(number, epoch)
            assert stop - start == len(within) <= block
            read += (start + within).tolist()
    assert sorted(read) == list(range(documents))


def test_permutations_are_pinned() -> None:
    """These values may never change: a run resumed with another version of Python or numpy would lose its place."""
    assert permutation(8, "blocks", 1234, 0).tolist() == PINNED
    assert permutation(8, "blocks", 1234, 1).tolist() != PINNED


def test_the_global_generator_has_no_say() -> None:
    first = permutation(50, "samples", 7, 0, 3).tolist()
    permutation.cache_clear()
    np.random.seed(99)
    assert permutation(50, "samples", 7, 0, 3).tolist() == first


def test_epochs_and_blocks_differ() -> None:
    order = Order.of(1000, 4, 50, 7)
    assert order.lane_blocks(0, 0).tolist() != order.lane_blocks(0, 1).tolist()
    assert order.block_order(0, 0).tolist() != order.block_order(1, 0).tolist()
    assert order.block_order(0, 0).tolist() != order.block_order(0, 1).tolist()


def test_replicas_take_contiguous_shares() -> None:
    assert [list(lanes_of_replica(8, replica, 4)) for replica in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("rows", "lanes", "replicas", "named"),
    [
        (12, 8, 1, r"train\.global_batch=12.*data\.lanes=8"),
        (16, 8, 3, r"data\.lanes=8.*parallel\.data=3"),
        (0, 8, 1, r"train\.global_batch=0"),
    ],
)
def test_a_layout_that_does_not_fit_is_named(rows: int, lanes: int, replicas: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_layout(rows, lanes, replicas)


def test_too_few_documents_are_named() -> None:
    with pytest.raises(UserError, match=r"data\.lanes=8.*7"):
        Order.of(7, 8, 256, 0)
