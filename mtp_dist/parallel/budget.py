"""What a layout costs each rank: parameters, bytes, micro-batches in flight, and floating-point operations a token.

Pure arithmetic on settings that passed validation and were resolved; needs no torch. Parameters and the bytes of weights,
gradients and optimizer are exact (up to ZeRO's padding of a few elements); activations and working memory are estimates.
"""

from dataclasses import dataclass

from mtp_dist.config.attention import possible
from mtp_dist.config.layout import chunks, chunks_of_rank, is_v, micro_batches
from mtp_dist.config.schema import ModelConfig, MTPConfig, ParallelConfig, TrainingRun
from mtp_dist.parallel.cost import attention_width, block_flops, block_matrices, tail_flops
from mtp_dist.parallel.placement import layers_of_chunks

GRADIENT_BYTES = 4
"""Gradients accumulate in float32, whatever the weights are."""
MOMENT_BYTES = 8
"""Adam's two float32 moments."""
MASTER_BYTES = 4
"""ZeRO's float32 copy of the weights; without ZeRO the weights themselves are float32."""
CHECKPOINT_BYTES = 12
"""Master and moments of each parameter, once."""
LOGITS_BYTES = 3 * 4 * (1 << 22)
"""The head loss holds about three float32 copies of the logits that it has in flight."""


@dataclass(frozen=True)
class Parameters:
    """Elements by owner: blocks and final norm of the trunk; the embedding; MTP modules; an output matrix of its own."""

    trunk: int = 0
    embedding: int = 0
    heads: int = 0
    output: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            self.trunk + other.trunk, self.embedding + other.embedding, self.heads + other.heads, self.output + other.output
        )

    @property
    def total(self) -> int:
        return self.trunk + self.embedding + self.heads + self.output


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `working`: buffers of the loss and of the optimizer step, which come and go."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def block_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """One decoder block's share on one of `tensor` ranks; norms are on each."""
    return block_matrices(model) // tensor + 2 * model.hidden


def vocabulary_rows(model: ModelConfig, tensor: int) -> int:
    """Rows of the embedding on the tensor rank that has most: one more than others where they do not come out even."""
    assert model.vocab_size is not None
    return -(-model.vocab_size // tensor)


def chunk_parameters(
    model: ModelConfig, mtp: MTPConfig, layers: int, *, first: bool = True, last: bool = True, tensor: int = 1
) -> Parameters:
    """One chunk's share on the tensor rank that has most."""
    vocabulary, block = vocabulary_rows(model, tensor) * model.hidden, block_parameters(model, tensor)
    module = 2 * model.hidden**2 + 3 * model.hidden + block
    looks_up = first or (last and (model.tie_embeddings or mtp.depth > 0))
    return Parameters(
        trunk=layers * block + (model.hidden if last else 0),
        embedding=vocabulary if looks_up else 0,
        heads=mtp.depth * module if last else 0,
        output=vocabulary if last and not model.tie_embeddings else 0,
    )


def rank_parameters(config: TrainingRun, pipeline_rank: int) -> Parameters:
    """What a rank of this pipeline rank holds. In a V placement the first and the last chunk share one embedding; a classic
    layout holds it on the first and on the last rank."""
    model, mtp, parallel = config.model, config.mtp, config.parallel
    layers, count = layers_of_chunks(config), chunks(parallel)
    held = Parameters()
    for number in chunks_of_rank(parallel, pipeline_rank):
        part = chunk_parameters(
            model, mtp, len(layers[number]), first=number == 0, last=number == count - 1, tensor=parallel.tensor
        )
        if held.embedding and part.embedding:
            part = Parameters(part.trunk, 0, part.heads, part.output)
        held += part
    return held


def chunks_in_flight(parallel: ParallelConfig, pipeline_rank: int, micro: int) -> int:
    """Most forward passes of single chunks that wait for their backward pass on a rank, with `micro` micro-batches a step."""
    if parallel.pipeline == 1:
        return 1
    if parallel.schedule == "interleaved":
        # Torch's warm-up (arXiv 2104.04473, section 2.2), and the pass that follows it.
        round_size = micro // max(1, micro // parallel.pipeline)
        warm_up = (parallel.interleave - 1) * round_size + 2 * (parallel.pipeline - 1 - pipeline_rank)
        return min(warm_up + 1, parallel.interleave * micro)
    if not is_v(parallel):
        return min(parallel.pipeline - pipeline_rank, micro)
    return min(2 * parallel.pipeline + (parallel.schedule == "dualpipev"), 2 * micro)


def block_activations(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Elements that one block keeps for its backward pass, a position: of each norm the input, the normalised and the weighted
    state (a share of the positions under sequence parallelism); queries, keys, values, the attention's output; the four inner
    states of SwiGLU."""
    split = 2 * attention_width(model, model.heads) + 2 * attention_width(model, model.kv_heads) + 4 * model.mlp
    return 6 * model.hidden // _position_shares(parallel) + split // parallel.tensor


def kept_activations(model: ModelConfig, parallel: ParallelConfig, recompute: str) -> int:
    """Elements that stay of one trunk block, a position, until its backward pass: all, its input, or that and the results of
    matrix products and attention."""
    if recompute == "none":
        return block_activations(model, parallel)
    outside = model.hidden // _position_shares(parallel)
    if recompute == "full":
        return outside
    products = 2 * attention_width(model, model.heads) + 2 * attention_width(model, model.kv_heads) + 2 * model.mlp
    return 3 * outside + products // parallel.tensor


def chunk_activations(config: TrainingRun, layers: int, *, last: bool) -> int:
    """Bytes that one forward pass of a chunk over one micro-batch keeps for its backward pass.

    An estimate: torch's fused attention keeps no scores, but a mask of its own for each block where a mask is what keeps
    documents apart (if it may be, on a device that is not known yet, it is counted).
    """
    model, depth, length = config.model, config.mtp.depth, config.train.sequence_length
    masked = any(choice.backend == "masked" for choice in possible(config))
    mask = length if masked else 0
    block = block_activations(model, config.parallel) + mask
    kept = kept_activations(model, config.parallel, config.train.recompute)
    elements = layers * (kept + (0 if config.train.recompute == "full" else mask))
    if config.train.recompute != "none" and layers:
        elements += block - kept  # one block at a time is whole again
    if last:
        # A module: its block, the concatenation and what its three norms keep beside it. Then the final norm, and the gradients
        # of 1 + D states, which the loss forms in the forward pass.
        outside = model.hidden // _position_shares(config.parallel)
        elements += depth * (block + 7 * outside) + 3 * outside + (1 + depth) * model.hidden
    return config.train.micro_batch * length * elements * dtype_bytes(config)


def _position_shares(parallel: ParallelConfig) -> int:
    return parallel.tensor if parallel.sequence_parallel else 1


def rank_memory(config: TrainingRun, pipeline_rank: int) -> Memory:
    """Bytes of the fullest moment of a training step on a rank of this pipeline rank."""
    model, parallel = config.model, config.parallel
    parameters = rank_parameters(config, pipeline_rank).total
    shards = parallel.data if config.zero.stage else 1
    masters = MASTER_BYTES if config.zero.stage else 0
    layers, numbers = layers_of_chunks(config), chunks_of_rank(parallel, pipeline_rank)
    has_last = chunks(parallel) - 1 in numbers
    passes = [chunk_activations(config, len(layers[n]), last=n == chunks(parallel) - 1) for n in numbers]
    in_flight = chunks_in_flight(parallel, pipeline_rank, micro_batches(config))
    # A V rank's passes in flight are of its two chunks in about equal parts.
    activations = -(-in_flight * sum(passes) // len(passes))
    bucket = 4 * min(config.zero.reduce_bucket_size, parameters)
    loss = 4 * vocabulary_rows(model, parallel.tensor) * model.hidden + LOGITS_BYTES if has_last else 0
    shard_gradient = 4 * parameters // shards if config.zero.stage else 0
    return Memory(
        weights=parameters * dtype_bytes(config),
        gradients=parameters * GRADIENT_BYTES // (parallel.data if config.zero.stage >= 2 else 1),
        optimizer=parameters * (masters + MOMENT_BYTES) // shards,
        activations=activations,
        working=max(loss, bucket + shard_gradient),
    )


def flops_per_token(config: TrainingRun) -> int:
    """Floating-point operations of forward and backward for one trained position."""
    length = config.train.sequence_length
    return config.model.layers * block_flops(config.model, length) + tail_flops(config.model, config.mtp, length)


def dtype_bytes(config: TrainingRun) -> int:
    """Of one weight or activation."""
    return 4 if config.train.dtype == "float32" else 2

