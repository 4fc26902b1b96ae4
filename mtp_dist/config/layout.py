"""Arithmetic of a run that follows from its settings alone: processes, chunks, micro-batches, steps.

Pure functions of a configuration that passed ``validation.validate``.
"""

import math

from mtp_dist.config.schema import Evaluation, Generation, ModelConfig, ParallelConfig, TrainingRun

Job = TrainingRun | Evaluation | Generation
"""Settings of what runs in several processes."""

V_SCHEDULES = ("zbv", "dualpipev")
SCHEDULES = ("1f1b", "interleaved", *V_SCHEDULES)


def world_size(parallel: ParallelConfig) -> int:
    """Processes of the whole job."""
    return parallel.pipeline * parallel.data * parallel.tensor


def key_value_sharers(model: ModelConfig, tensor: int) -> int:
    """How many of `tensor` ranks hold each key/value head: 1 up to as many ranks as heads."""
    return max(1, tensor // model.kv_heads)


def is_v(parallel: ParallelConfig) -> bool:
    """Whether first and last chunk share a rank; one rank alone is no pipeline."""
    return parallel.pipeline > 1 and parallel.schedule in V_SCHEDULES


def chunks(parallel: ParallelConfig) -> int:
    """Parts of the trunk: two a pipeline rank in a V placement, several when interleaved, else one; one without a pipeline."""
    if parallel.pipeline == 1:
        return 1
    per_rank = 2 if is_v(parallel) else parallel.interleave if parallel.schedule == "interleaved" else 1
    return per_rank * parallel.pipeline


def chunks_of_rank(parallel: ParallelConfig, pipeline_rank: int) -> list[int]:
    """Chunk numbers that a pipeline rank runs, ascending: a V, or round the ranks again (interleaved), or one."""
    if is_v(parallel):
        return [pipeline_rank, 2 * parallel.pipeline - 1 - pipeline_rank]
    return list(range(pipeline_rank, chunks(parallel), parallel.pipeline))


def rank_of_chunk(parallel: ParallelConfig, chunk: int) -> int:
    """The pipeline rank that runs a chunk."""
    if is_v(parallel) and chunk >= parallel.pipeline:
        return 2 * parallel.pipeline - 1 - chunk
    return chunk % parallel.pipeline


def placement_by_hand(placement: str) -> list[int]:
    """Layers of each chunk from `[3,2,2,1]` (brackets may be missing); ValueError for anything else."""
    return [int(size) for size in placement.strip("[] ").split(",")]


def micro_batches(config: TrainingRun) -> int:
    """M: forward passes of each replica in one optimizer step."""
    return config.train.global_batch // (config.parallel.data * config.train.micro_batch)


def fewest_micro_batches(parallel: ParallelConfig) -> int:
    """The least M of a schedule: DualPipeV is refused by torch with fewer than its chunks, the others leave slots empty."""
    if parallel.pipeline > 1 and parallel.schedule == "dualpipev":
        return chunks(parallel)
    return 1


def tokens_per_step(config: TrainingRun) -> int:
    """Positions trained in one optimizer step."""
    return config.train.global_batch * config.train.sequence_length


def total_steps(config: TrainingRun) -> int:
    """Optimizer steps of the whole run, from ``train.steps`` or else ``train.tokens``."""
    if config.train.steps is not None:
        return config.train.steps
    if config.train.tokens is None:
        raise ValueError("neither train.steps nor train.tokens")
    return math.ceil(config.train.tokens / tokens_per_step(config))


def processes_per_node(config: Job) -> int:
    """Processes on each machine."""
    return config.launch.processes_per_node or world_size(config.parallel) // config.launch.nodes
