"""Which trunk layers make each chunk, and which pipeline rank runs it. Pure functions of the settings.

V placement, PP = 4 (the embedding, the heads and the loss are all on rank 0):

    rank   0          1          2          3
    down   chunk 0 -> chunk 1 -> chunk 2 -> chunk 3
    up     chunk 7 <- chunk 6 <- chunk 5 <- chunk 4
"""

from mtp_dist.config.layout import chunks, is_v
from mtp_dist.config.schema import ParallelConfig


def chunks_of_rank(parallel: ParallelConfig, pipeline_rank: int) -> list[int]:
    """Chunk numbers that a pipeline rank runs, ascending."""
    if is_v(parallel):
        return [pipeline_rank, 2 * parallel.pipeline - 1 - pipeline_rank]
    return [pipeline_rank]


def rank_of_chunk(parallel: ParallelConfig, chunk: int) -> int:
    if is_v(parallel) and chunk >= parallel.pipeline:
        return 2 * parallel.pipeline - 1 - chunk
    return chunk


def layers_of_chunks(parallel: ParallelConfig, layers: int) -> list[range]:
    """The contiguous layers of each chunk. Uneven counts: earlier chunks take the extra layers, as the last one carries the
    heads."""
    count = chunks(parallel)
    sizes = parallel.placement or [layers // count + (i < layers % count) for i in range(count)]
    ranges, begin = [], 0
    for size in sizes:
        ranges.append(range(begin, begin + size))
        begin += size
    return ranges
