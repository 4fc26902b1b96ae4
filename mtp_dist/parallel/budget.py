"""What a layout costs each rank: parameters, bytes, micro-batches in flight, and floating-point operations a token.

Pure arithmetic on settings that passed validation and were resolved; needs no torch. Parameters and the bytes of weights,
gradients and optimizer are exact (up to ZeRO's padding of a few elements); activations and working memory are estimates.
"""

from dataclasses import dataclass

from mtp_dist.config.attention import possible
from mtp_dist.config.heads import (
    embeds_on_last,
    fused_states,
    handed_taps,
    has_adversary,
    modules,
    owns_embeddings,
    owns_projections,
    received_taps,
)
from mtp_dist.config.layout import chunks, chunks_of_rank, is_v, micro_batches
from mtp_dist.config.schema import ModelConfig, MTPConfig, ParallelConfig, TrainingRun
from mtp_dist.parallel.cost import (
    attention_width,
    beside_blocks,
    block_flops,
    block_matrices,
    blocks_of_module,
    key_width,
    tail_flops,
    wider_attention,
)
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
    """Bytes of one rank's device. `working`: buffers of the loss and of the optimizer step, and weights that ZeRO-3 has gathered,
    which come and go. Not in the total, in the host's memory: `host`, an offloaded optimizer and the exact weights of a frozen
    trunk in bfloat16; `snapshot`, what a background save copies of the rank that owns most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    host: int = 0
    snapshot: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def block_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """One decoder block's share on one of `tensor` ranks; norms are on each."""
    return block_matrices(model, tensor) + 2 * model.hidden


def vocabulary_rows(model: ModelConfig, tensor: int) -> int:
    """Rows of the embedding on the tensor rank that has most: one more than others where they do not come out even."""
    assert model.vocab_size is not None
    return -(-model.vocab_size // tensor)


def vectors_beside_blocks(model: ModelConfig, mtp: MTPConfig) -> int:
    """Elements of one MTP module's norms and biases, those of its decoder blocks apart; on each tensor rank."""
    if mtp.kind == "notebook":
        return model.hidden + mtp.blocks * (7 * model.hidden + model.mlp)
    return {"sequential": 3, "medusa": mtp.blocks, "eagle3": 2}.get(mtp.kind, 0) * model.hidden


def module_parameters(model: ModelConfig, mtp: MTPConfig, tensor: int = 1) -> int:
    """One MTP module's share on the one of `tensor` ranks that has most: its blocks and its matrices of the vocabulary are split;
    what it has beside them is on each."""
    blocks = blocks_of_module(mtp) * block_parameters(model, tensor) + wider_attention(model, mtp, tensor)
    matrices = own_projection(model, mtp, tensor) + own_embedding(model, mtp, tensor)
    return blocks + beside_blocks(model, mtp) + vectors_beside_blocks(model, mtp) + matrices


def adversary_parameters(model: ModelConfig, mtp: MTPConfig, tensor: int = 1) -> int:
    """The discriminator's share on the one of `tensor` ranks that has most."""
    return -(-model.hidden // tensor) * (model.hidden + 1) if has_adversary(mtp) else 0


def own_projection(model: ModelConfig, mtp: MTPConfig, tensor: int = 1) -> int:
    """Elements of one MTP module's own vocabulary projection, where it has one."""
    return vocabulary_rows(model, tensor) * model.hidden if owns_projections(mtp) else 0


def own_embedding(model: ModelConfig, mtp: MTPConfig, tensor: int = 1) -> int:
    """Elements of one MTP module's own embedding, where it has one."""
    return vocabulary_rows(model, tensor) * model.hidden if owns_embeddings(mtp) else 0


def chunk_parameters(
    model: ModelConfig, mtp: MTPConfig, layers: int, *, first: bool = True, last: bool = True, tensor: int = 1
) -> Parameters:
    """One chunk's share on the tensor rank that has most."""
    vocabulary, block = vocabulary_rows(model, tensor) * model.hidden, block_parameters(model, tensor)
    looks_up = first or (last and embeds_on_last(model, mtp))
    return Parameters(
        trunk=layers * block + (model.hidden if last else 0),
        embedding=vocabulary if looks_up else 0,
        heads=modules(mtp) * module_parameters(model, mtp, tensor) + adversary_parameters(model, mtp, tensor) if last else 0,
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
    if parallel.schedule == "dualpipev":
        return min(2 * parallel.pipeline + 1, 2 * micro)
    # With few micro-batches the first ranks have run all down before they run any up.
    return min(2 * parallel.pipeline, 2 * micro, micro + 1 + pipeline_rank)


def block_activations(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Elements that one block keeps for its backward pass, a position: of each norm the input, the normalised and the weighted
    state (a share of the positions under sequence parallelism); queries, keys, values, the attention's output; the four inner
    states of SwiGLU."""
    split = 2 * attention_width(model, model.heads) + 4 * model.mlp
    keys = 2 * key_width(model, parallel.tensor)
    return 6 * model.hidden // _position_shares(parallel) + split // parallel.tensor + keys


def kept_activations(model: ModelConfig, parallel: ParallelConfig, recompute: str) -> int:
    """Elements that stay of one trunk block, a position, until its backward pass: all, its input, or that and the results of
    matrix products and attention."""
    if recompute == "none":
        return block_activations(model, parallel)
    outside = model.hidden // _position_shares(parallel)
    if recompute == "full":
        return outside
    products = 2 * attention_width(model, model.heads) + 2 * model.mlp
    return 3 * outside + products // parallel.tensor + 2 * key_width(model, parallel.tensor)


def activations_beside_blocks(model: ModelConfig, mtp: MTPConfig) -> int:
    """Elements that one MTP module keeps for its backward pass, a position, those of its decoder blocks apart: the concatenation
    and what norms keep beside it, the shared norm, or what residual blocks or the notebook's layers keep."""
    if mtp.kind == "notebook":
        return 4 * model.hidden + mtp.blocks * (5 * model.hidden + model.mlp)
    return {"sequential": 7, "parallel": 3, "medusa": 2 * mtp.blocks, "eagle": 4, "eagle3": 3}.get(mtp.kind, 0) * model.hidden


def chunk_activations(config: TrainingRun, layers: int, *, last: bool, taps: int = 0) -> int:
    """Bytes that one forward pass of a chunk over one micro-batch keeps for its backward pass. `taps`: states that come in or go
    out beside the hidden one.

    An estimate: torch's fused attention keeps no scores, but a mask of its own for each block where a mask is what keeps
    documents apart (if it may be, on a device that is not known yet, it is counted).
    """
    model, depth, length = config.model, config.mtp.depth, config.train.sequence_length
    masked = any(choice.backend == "masked" for choice in possible(config))
    mask = length if masked else 0
    block = block_activations(model, config.parallel) + mask
    kept = kept_activations(model, config.parallel, config.train.recompute)
    elements = layers * (kept + (0 if config.train.recompute == "full" else mask))
    elements += taps * (model.hidden // _position_shares(config.parallel))
    if config.train.recompute != "none" and layers:
        elements += block - kept  # one block at a time is whole again
    if last:
        # A module: its blocks and what it keeps beside them. Then the final norm, and the gradients of 1 + D states, which the
        # loss forms in the forward pass.
        shares = _position_shares(config.parallel)
        module = blocks_of_module(config.mtp) * block + activations_beside_blocks(model, config.mtp) // shares
        elements += depth * module + 3 * (model.hidden // shares) + (1 + depth) * model.hidden
        if has_adversary(config.mtp):
            # The depths' states, and two inner ones of each evaluation.
            elements += depth * model.hidden + 2 * (1 + 2 * depth) * (model.hidden // config.parallel.tensor)
        if config.mtp.kind == "eagle3":
            # The joined states; and step s has the keys and values of s steps and the trunk's at hand, and a mask over them.
            elements += (len(fused_states(model, config.mtp)) + 1) * model.hidden // shares
            entry = 2 * key_width(model, config.parallel.tensor)
            elements += depth * (depth - 1) // 2 * (entry + length)
    return config.train.micro_batch * length * elements * dtype_bytes(config)


def _activations_of(config: TrainingRun, layers: range, *, last: bool) -> int:
    received = received_taps(config.model, config.mtp, layers)
    taps = len(received) + len(handed_taps(config.model, config.mtp, layers, last=last))
    return chunk_activations(config, len(layers), last=last, taps=taps)


def _position_shares(parallel: ParallelConfig) -> int:
    return parallel.tensor if parallel.sequence_parallel else 1


def rank_memory(config: TrainingRun, pipeline_rank: int) -> Memory:
    """Bytes of the fullest moment of a training step on a rank of this pipeline rank."""
    model, parallel, zero, frozen = config.model, config.parallel, config.zero, config.mtp.freeze_trunk
    rows = vocabulary_rows(model, parallel.tensor)
    held, weight = rank_parameters(config, pipeline_rank), dtype_bytes(config)
    trained = held.heads if frozen else held.total
    shards = parallel.data if zero.stage else 1
    # ZeRO-3 works on the shard of float32 weights itself where it stays on the device.
    masters = MASTER_BYTES if zero.stage and (zero.stage < 3 or weight != MASTER_BYTES or zero.offload) else 0
    optimizer = trained * (masters + MOMENT_BYTES) // shards
    has_last = chunks(parallel) - 1 in chunks_of_rank(parallel, pipeline_rank)
    bucket = 4 * min(zero.reduce_bucket_size, trained)
    projections = (not frozen) * rows * model.hidden + config.mtp.depth * own_projection(model, config.mtp, parallel.tensor)
    loss = LOGITS_BYTES + 4 * projections if has_last else 0
    shard_gradient = GRADIENT_BYTES * trained // shards if zero.stage else 0
    weights, gathered = held.total * weight, 0
    if zero.stage == 3:
        vectors = rank_vectors(config)
        largest = max(rows * model.hidden, model.mlp * model.hidden // parallel.tensor, 2 * model.hidden**2)
        gathered = weight * min(held.total - vectors, zero.allgather_bucket_size + largest)
        weights = held.total * weight // parallel.data + vectors * weight
    gradients = trained * GRADIENT_BYTES if zero.stage < 2 else 0 if zero.offload else shard_gradient
    exact_frozen = MASTER_BYTES * (held.total - trained) // parallel.data if weight != MASTER_BYTES else 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=0 if zero.offload else optimizer,
        activations=_activations(config, pipeline_rank),
        working=gathered + max(loss, bucket + (0 if zero.offload else shard_gradient)),
        host=exact_frozen + (optimizer + shard_gradient if zero.offload else 0),
        snapshot=(CHECKPOINT_BYTES * trained // shards + MASTER_BYTES * (held.total - trained) // parallel.data)
        if config.checkpoint.asynchronous
        else 0,
    )


def rank_vectors(config: TrainingRun) -> int:
    """Elements of norms and biases, which ZeRO-3 (without a pipeline) keeps whole on each rank."""
    model, mtp = config.model, config.mtp
    module = 2 * model.hidden * blocks_of_module(mtp) + vectors_beside_blocks(model, mtp)
    return model.hidden * (2 * model.layers + 1) + modules(mtp) * module


def _activations(config: TrainingRun, pipeline_rank: int) -> int:
    """Bytes that wait for backward passes."""
    parallel = config.parallel
    layers, numbers, end = layers_of_chunks(config), chunks_of_rank(parallel, pipeline_rank), chunks(parallel) - 1
    if config.mtp.freeze_trunk:
        # The heads alone run backward, a micro-batch at a time; states on their way to the next chunk wait until the end.
        heads = _activations_of(config, range(config.model.layers, config.model.layers), last=True) if end in numbers else 0
        states = [1 + len(handed_taps(config.model, config.mtp, layers[n], last=False)) for n in numbers if n < end]
        edge = config.train.micro_batch * config.train.sequence_length * config.model.hidden // _position_shares(parallel)
        return heads + micro_batches(config) * edge * dtype_bytes(config) * sum(states)
    passes = [_activations_of(config, layers[n], last=n == end) for n in numbers]
    in_flight = chunks_in_flight(parallel, pipeline_rank, micro_batches(config))
    # A V rank's passes in flight are of its two chunks in about equal parts.
    return -(-in_flight * sum(passes) // len(passes))


def flops_per_token(config: TrainingRun) -> int:
    """Floating-point operations of forward and backward for one trained position; a frozen trunk runs forward only."""
    length = config.train.sequence_length
    trunk = config.model.layers * block_flops(config.model, length)
    return trunk // (3 if config.mtp.freeze_trunk else 1) + tail_flops(config.model, config.mtp, length)


def dtype_bytes(config: TrainingRun) -> int:
    """Of one weight or activation."""
    return 4 if config.train.dtype == "float32" else 2

