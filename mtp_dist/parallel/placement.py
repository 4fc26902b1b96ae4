"""Which trunk layers make each chunk. Pure functions of the settings.

V placement, PP = 4 (the embedding, the heads and the loss are all on rank 0):

    rank   0          1          2          3
    down   chunk 0 -> chunk 1 -> chunk 2 -> chunk 3
    up     chunk 7 <- chunk 6 <- chunk 5 <- chunk 4

A step takes at least as long as its busiest rank, and the MTP modules with their 1 + D projections onto the vocabulary may weigh
as much as many layers: the balanced placement counts them. (Moving layers further, to where a simulated step of the schedule is
shortest, was tried: it gains less than 1 % with the V schedules, and splits a rank's layers unevenly.)
"""

from functools import lru_cache

from mtp_dist.config.layout import chunks, chunks_of_rank, placement_by_hand
from mtp_dist.config.schema import ParallelConfig, TrainingRun
from mtp_dist.parallel.cost import costs


def layers_of_chunks(config: TrainingRun) -> list[range]:
    """The contiguous layers of each chunk, as `parallel.placement` says."""
    parallel, layers = config.parallel, config.model.layers
    if parallel.placement == "uniform":
        sizes = uniform(chunks(parallel), layers)
    elif parallel.placement == "balanced":
        sizes = balanced(parallel, layers, costs(config).tail_in_layers)
    else:
        sizes = placement_by_hand(parallel.placement)
    ranges, begin = [], 0
    for size in sizes:
        ranges.append(range(begin, begin + size))
        begin += size
    return ranges


def uniform(count: int, layers: int) -> list[int]:
    """As even as can be; earlier chunks take the extra layers, as the last one carries the heads."""
    return [layers // count + (i < layers % count) for i in range(count)]


def balanced(parallel: ParallelConfig, layers: int, tail: float) -> list[int]:
    """Layers of each chunk such that the busiest rank is as little busy as possible, and then its chunks as even as possible.

    `tail`: cost of what follows the last layer, in layers. All layers cost the same, so giving each next layer to the rank that
    is least busy with it is optimal. Every chunk has a layer, but the last one, which may be the heads alone.
    """
    ranks = tuple(tuple(chunks_of_rank(parallel, rank)) for rank in range(parallel.pipeline))
    return list(_balanced(ranks, chunks(parallel), layers, tail))


@lru_cache(maxsize=256)
def _balanced(ranks: tuple[tuple[int, ...], ...], count: int, layers: int, tail: float) -> tuple[int, ...]:
    """`ranks`: chunks of each. Kept, since a plan asks for the same ones for every rank and every number of replicas."""
    if count == 1:
        return (layers,)
    sizes = [1] * (count - 1) + [0]
    extra = [0.0] * (count - 1) + [tail]

    def chunk_cost(number: int) -> float:
        return sizes[number] + extra[number]

    def rank_cost(rank: int) -> float:
        return sum(chunk_cost(number) for number in ranks[rank])

    for _ in range(layers - sum(sizes)):
        # Of equal ranks the later one: it is farther from the heads, and has less in flight.
        rank = min(range(len(ranks)), key=lambda r: (rank_cost(r), -r))
        number = min(ranks[rank], key=chunk_cost)
        sizes[number] += 1
    return tuple(sizes)


def rank_costs(config: TrainingRun) -> list[float]:
    """Work of each pipeline rank, in layers; the largest over the mean is how much longer a step takes than a perfect split."""
    parallel, layers = config.parallel, layers_of_chunks(config)
    work = [float(len(part)) for part in layers]
    work[-1] += costs(config).tail_in_layers
    return [sum(work[number] for number in chunks_of_rank(parallel, rank)) for rank in range(parallel.pipeline)]
