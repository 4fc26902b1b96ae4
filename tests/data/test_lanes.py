"""The order of the data depends on the seed alone and gives every document to exactly one lane."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.data.lanes import Order, check_layout, lanes_of_replica, permutation, row_permutation
from mtp_dist.errors import UserError

PINNED = [2, 1, 0, 3, 4, 7, 5, 6]  # of 8, seed ("blocks", 1234, 0)
PINNED_ROWS = [16, 8, 0, 10, 2, 18, 4, 12, 14, 6, 9, 17, 1, 19, 11, 3, 13, 5, 15, 7]  # of 20, seed ("rows", 1234, 0, 0, 0)


def ordered(documents: int, lanes: int, block: int, seed: int, mix_tokens: int = 0, tokens: int = 100) -> Order:
    return Order.of(documents, documents * tokens, lanes=lanes, block_samples=block, mix_tokens=mix_tokens, seed=seed)


@given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_lanes_share_out_the_documents_of_an_epoch(documents: int, lanes: int, block: int, seed: int, epoch: int) -> None:
    documents += lanes
    order = ordered(documents, lanes, block, seed)
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
    assert row_permutation(20, "rows", 1234, 0, 0, 0).tolist() == PINNED_ROWS


def test_the_global_generator_has_no_say() -> None:
    first = permutation(50, "samples", 7, 0, 3).tolist()
    permutation.cache_clear()
    np.random.seed(99)
    assert permutation(50, "samples", 7, 0, 3).tolist() == first


def test_epochs_and_blocks_differ() -> None:
    order = ordered(1000, 4, 50, 7)
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
        ordered(7, 8, 256, 0)


@given(st.integers(0, 400), st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_rows_are_permuted_with_neighbours_apart(size: int, seed: int) -> None:
    """Any quarter of the order, so any step of up to a quarter of a window, holds no two neighbouring rows."""
    order = row_permutation(size, "rows", seed)
    assert sorted(order.tolist()) == list(range(size))
    turns = np.empty(size, dtype=np.int64)
    turns[order] = np.arange(size)
    if size >= 32:
        assert np.abs(np.diff(turns)).min() >= size // 4 - 1


@given(st.integers(1, 2000), st.integers(1, 12), st.integers(1, 60), st.integers(1, 10**6))
@settings(max_examples=150, deadline=None)
def test_windows_share_out_the_blocks_of_a_lane(documents: int, lanes: int, block: int, mix_tokens: int) -> None:
    """Each block is in one window; the windows of all lanes together hold about `mix_tokens` tokens, and one block at least."""
    order = ordered(documents + lanes, lanes, block, 1, mix_tokens)
    tokens_of_block = 100 * (documents + lanes) / order.blocks
    for lane in range(lanes):
        windows = order.windows(lane, 0)
        assert [number for window in windows for number in window] == list(range(len(order.lane_blocks(lane, 0))))
        sizes = {len(window) for window in windows}
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        assert max(sizes) == 1 or (max(sizes) - 0.5) * tokens_of_block <= mix_tokens / lanes
