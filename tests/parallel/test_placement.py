"""Promise: every layer is in exactly one chunk, every chunk on exactly one rank, in order; and no other placement has a less
busy busiest rank."""

import re
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.config.attention import choose
from mtp_dist.config.layout import SCHEDULES, chunks, chunks_of_rank, is_v, rank_of_chunk
from mtp_dist.config.schema import ParallelConfig, TrainingRun
from mtp_dist.parallel.budget import rank_parameters
from mtp_dist.parallel.cost import costs
from mtp_dist.parallel.drawing import placement_drawing, shown_count
from mtp_dist.parallel.placement import balanced, layers_of_chunks, rank_costs, uniform

LAYOUTS = st.builds(
    ParallelConfig, pipeline=st.integers(1, 16), schedule=st.sampled_from(SCHEDULES), interleave=st.integers(2, 4)
)


def run(parallel: ParallelConfig, layers: int, placement: str, tail: float = 0.0) -> TrainingRun:
    config = TrainingRun(parallel=parallel)
    config.model.layers, config.parallel.placement, config.parallel.costs = layers, placement, [1, 1, 1, 3 * tail, 0, 0]
    return config


def busiest(parallel: ParallelConfig, sizes: list[int], tail: float) -> float:
    costs = [*sizes[:-1], sizes[-1] + tail]
    return max(sum(costs[number] for number in chunks_of_rank(parallel, rank)) for rank in range(parallel.pipeline))


@given(LAYOUTS, st.integers(0, 100), st.sampled_from(["balanced", "uniform"]), st.floats(0, 50))
@settings(deadline=None)
def test_layers_are_covered_once_in_order(parallel: ParallelConfig, more: int, placement: str, tail: float) -> None:
    layers = chunks(parallel) + more
    found = layers_of_chunks(run(parallel, layers, placement, tail))
    assert len(found) == chunks(parallel)
    assert [layer for part in found for layer in part] == list(range(layers))
    sizes = [len(part) for part in found]
    assert min(sizes[:-1], default=1) >= 1
    if placement == "uniform":
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True), "the last chunk carries the heads: it never has the extra layer"


@given(
    st.builds(ParallelConfig, pipeline=st.integers(1, 3), schedule=st.sampled_from(SCHEDULES), interleave=st.just(2)),
    st.integers(0, 5),
    st.floats(0, 8),
)
@settings(deadline=None, max_examples=60)
def test_no_placement_is_better_than_the_balanced_one(parallel: ParallelConfig, more: int, tail: float) -> None:
    count = chunks(parallel)
    layers = count + more
    every = (
        list(sizes)
        for sizes in product(*[range(1, layers + 1)] * (count - 1), range(layers + 1))
        if sum(sizes) == layers
    )
    best = min(busiest(parallel, sizes, tail) for sizes in every)
    assert busiest(parallel, balanced(parallel, layers, tail), tail) == pytest.approx(best)


@given(LAYOUTS, st.data())
@settings(deadline=None)
def test_a_placement_by_hand_is_kept(parallel: ParallelConfig, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 9)) for _ in range(chunks(parallel) - 1)] + [data.draw(st.integers(0, 9))]
    found = layers_of_chunks(run(parallel, sum(sizes), str(sizes)))
    assert [len(part) for part in found] == sizes
    assert layers_of_chunks(run(parallel, sum(sizes), ",".join(map(str, sizes)))) == found


@given(LAYOUTS)
@settings(deadline=None)
def test_every_chunk_has_one_rank(parallel: ParallelConfig) -> None:
    held = [chunks_of_rank(parallel, rank) for rank in range(parallel.pipeline)]
    assert sorted(number for numbers in held for number in numbers) == list(range(chunks(parallel)))
    for rank, numbers in enumerate(held):
        assert numbers == sorted(numbers)
        assert len(numbers) == chunks(parallel) // parallel.pipeline
        assert all(rank_of_chunk(parallel, number) == rank for number in numbers)


@given(LAYOUTS)
@settings(deadline=None)
def test_neighbours_are_neighbours(parallel: ParallelConfig) -> None:
    """A state travels to the next rank (round the end, when interleaved); in a V the ends meet on rank 0, and the turn stays on
    the last rank."""
    ranks = [rank_of_chunk(parallel, number) for number in range(chunks(parallel))]
    if is_v(parallel):
        assert all(abs(a - b) <= 1 for a, b in pairwise(ranks))
        assert ranks[0] == ranks[-1] == 0
        assert ranks == ranks[::-1]
    else:
        assert all((b - a) % parallel.pipeline == 1 % parallel.pipeline for a, b in pairwise(ranks))


def test_the_picture() -> None:
    parallel = ParallelConfig(pipeline=4, schedule="zbv")
    assert [chunks_of_rank(parallel, rank) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert uniform(8, 10) == [2, 2, 1, 1, 1, 1, 1, 1]


def test_heads_count() -> None:
    """The laptop run: two modules and three projections weigh as much as several of its layers, so the heads' rank gets fewer."""
    config = run(ParallelConfig(pipeline=2, schedule="zbv"), 8, "balanced")
    config.parallel.costs = []
    config.model.vocab_size, config.model.hidden, config.model.heads, config.model.kv_heads = 4096, 192, 6, 2
    config.model.head_dim, config.model.mlp, config.train.sequence_length, config.mtp.depth = 32, 512, 128, 2
    assert 6 < costs(config).tail_in_layers < 9
    assert [len(part) for part in layers_of_chunks(config)] == [1, 4, 3, 0]
    even = run(ParallelConfig(pipeline=2, schedule="zbv"), 8, "uniform", costs(config).tail_in_layers)
    assert max(rank_costs(config)) < 0.8 * max(rank_costs(even))


def test_the_table_at_start() -> None:
    config = run(ParallelConfig(pipeline=2, schedule="zbv"), 8, "[1,4,3,0]", 7.7)
    config.model.vocab_size, config.model.head_dim = 4096, 32
    lines = placement_drawing(config, choose(config.model, config.train, "cpu")).splitlines()
    assert lines[0].endswith("; attention masked (documents; cpu)")
    assert lines[1].split() == ["pipeline", "rank", "0", "1"]
    assert " ".join(lines[2].split()) == "down embedding, layer 0 → layers 1-4 ┐"
    assert " ".join(lines[3].split()) == "up 2 MTP modules, head ← layers 5-7 ┘"
    assert lines[2].index("→") == lines[3].index("←")
    totals = [rank_parameters(config, rank).total for rank in (0, 1)]
    assert lines[4].split() == ["parameters", *map(shown_count, totals)]
    assert lines[5].split() == ["work", "8.7", "layers", "7.0", "layers"]


@pytest.mark.parametrize("parallel", [
    ParallelConfig(pipeline=1),
    ParallelConfig(pipeline=4, schedule="1f1b"),
    ParallelConfig(pipeline=2, schedule="interleaved", interleave=3),
    ParallelConfig(pipeline=3, schedule="dualpipev"),
    ParallelConfig(pipeline=8, schedule="zbv"),
])  # fmt: skip
def test_every_layer_is_drawn_once(parallel: ParallelConfig) -> None:
    config = run(parallel, 24, "uniform", 1.0)
    config.model.vocab_size, config.model.head_dim = 4096, 32
    drawing, found = placement_drawing(config, choose(config.model, config.train, "cpu")), list[int]()
    for first, last in re.findall(r"layers? (\d+)(?:-(\d+))?", drawing):
        found += range(int(first), int(last or first) + 1)
    assert sorted(found) == list(range(24))


def test_counts_are_short() -> None:
    assert [shown_count(n) for n in (7, 1_234, 12_345_678, 405 * 10**9)] == ["7", "1.2K", "12.3M", "405.0B"]
