"""Promise: every layer is in exactly one chunk, every chunk on exactly one rank, in order, in every layout."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.config.layout import SCHEDULES, chunks, is_v
from mtp_dist.config.schema import ParallelConfig
from mtp_dist.parallel.placement import chunks_of_rank, layers_of_chunks, rank_of_chunk

LAYOUTS = st.builds(ParallelConfig, pipeline=st.integers(1, 16), schedule=st.sampled_from(SCHEDULES))


@st.composite
def placed(draw: st.DrawFn) -> tuple[ParallelConfig, int]:
    """A layout with a placement by hand, and the layers that it adds up to."""
    parallel = draw(LAYOUTS)
    count = chunks(parallel)
    parallel.placement = [draw(st.integers(1, 9)) for _ in range(count - 1)] + [draw(st.integers(0, 9))]
    return parallel, sum(parallel.placement)


def joined(ranges: list[range]) -> list[int]:
    return [layer for part in ranges for layer in part]


@given(LAYOUTS, st.integers(1, 200))
@settings(deadline=None)
def test_layers_are_covered_once_in_order_and_evenly(parallel: ParallelConfig, layers: int) -> None:
    found = layers_of_chunks(parallel, layers)
    assert len(found) == chunks(parallel)
    assert joined(found) == list(range(layers))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "the last chunk carries the heads: it never has the extra layer"


@given(placed())
@settings(deadline=None)
def test_a_placement_by_hand_is_kept(case: tuple[ParallelConfig, int]) -> None:
    parallel, layers = case
    found = layers_of_chunks(parallel, layers)
    assert [len(part) for part in found] == parallel.placement
    assert joined(found) == list(range(layers))


@given(LAYOUTS)
@settings(deadline=None)
def test_every_chunk_has_one_rank(parallel: ParallelConfig) -> None:
    held = [chunks_of_rank(parallel, rank) for rank in range(parallel.pipeline)]
    assert sorted(number for numbers in held for number in numbers) == list(range(chunks(parallel)))
    for rank, numbers in enumerate(held):
        assert numbers == sorted(numbers)
        assert len(numbers) == (2 if is_v(parallel) else 1)
        assert all(rank_of_chunk(parallel, number) == rank for number in numbers)


@given(LAYOUTS)
@settings(deadline=None)
def test_neighbours_are_neighbours(parallel: ParallelConfig) -> None:
    """A state travels at most one rank; in a V the ends meet on rank 0, and the turn stays on the last rank."""
    ranks = [rank_of_chunk(parallel, number) for number in range(chunks(parallel))]
    assert all(abs(a - b) <= 1 for a, b in pairwise(ranks))
    if is_v(parallel):
        assert ranks[0] == ranks[-1] == 0
        assert ranks == ranks[::-1]
    else:
        assert ranks == list(range(parallel.pipeline))


def test_the_picture() -> None:
    parallel = ParallelConfig(pipeline=4, schedule="zbv")
    assert [chunks_of_rank(parallel, rank) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert [list(part) for part in layers_of_chunks(parallel, 10)] == [[0, 1], [2, 3], [4], [5], [6], [7], [8], [9]]
