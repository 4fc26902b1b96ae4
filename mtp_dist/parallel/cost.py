"""What the model's parts cost: floating-point operations by formula, or times that were measured (``parallel.costs``).

Pure arithmetic on resolved settings. Operations are of one trained position, forward and backward: 6 for each matrix element
that a position passes, and 12 S H c a block for attention, causality not deducted (arXiv 2204.02311, appendix B). A third of the
matrix operations are forward, a third give the gradient of the input, a third that of the weight.
"""

from typing import NamedTuple

from mtp_dist.config.heads import detaches, fused_states, has_adversary, owns_projections, predicts_tokens, soft_targets
from mtp_dist.config.layout import key_value_sharers
from mtp_dist.config.schema import ModelConfig, MTPConfig, TrainingRun


class Work(NamedTuple):
    """Time of one micro-batch, in any one unit: forward pass, gradient of the input, gradient of the weights."""

    forward: float
    backward: float
    weight: float

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "Work":  # type: ignore[override]
        return Work(*(times * part for part in self))

    @property
    def total(self) -> float:
        return sum(self)


class Costs(NamedTuple):
    """`block`: one trunk layer. `tail`: what follows the last one: MTP modules, vocabulary projections, loss."""

    block: Work
    tail: Work

    @property
    def tail_in_layers(self) -> float:
        return self.tail.total / self.block.total

    def of_chunks(self, sizes: list[int]) -> list[Work]:
        """The work of chunks with so many layers each; the last one has the tail too."""
        works = [self.block * size for size in sizes]
        return [*works[:-1], works[-1] + self.tail]


def attention_width(model: ModelConfig, heads: int) -> int:
    """H c: width of all `heads` together."""
    assert model.head_dim is not None
    return heads * model.head_dim


def key_width(model: ModelConfig, tensor: int = 1) -> int:
    """Width of the key heads on each of `tensor` ranks, and that of the value heads: one head at least."""
    return attention_width(model, model.kv_heads) * key_value_sharers(model, tensor) // tensor


def block_matrices(model: ModelConfig, tensor: int = 1) -> int:
    """Matrix elements of one decoder block on each of `tensor` ranks."""
    split = 2 * attention_width(model, model.heads) + 3 * model.mlp
    return model.hidden * (split // tensor + 2 * key_width(model, tensor))


def block_flops(model: ModelConfig, sequence_length: int) -> int:
    """One decoder block."""
    return 6 * block_matrices(model) + 12 * sequence_length * attention_width(model, model.heads)


def beside_blocks(model: ModelConfig, mtp: MTPConfig) -> int:
    """Matrix elements of one MTP module beside its decoder blocks, whole on each tensor rank: the projection of several states to
    one, Medusa's residual blocks, the notebook's layers."""
    if mtp.kind == "notebook":
        return 2 * model.hidden**2 + mtp.blocks * 2 * model.hidden * (model.hidden + model.mlp)
    squares = {"sequential": 2, "medusa": mtp.blocks, "eagle": 2, "eagle3": len(fused_states(model, mtp))}.get(mtp.kind, 0)
    return squares * model.hidden**2


def wider_attention(model: ModelConfig, mtp: MTPConfig, tensor: int = 1) -> int:
    """Matrix elements on each of `tensor` ranks that the block of an MTP module has more than the trunk's: EAGLE-3's attention
    reads two states."""
    width = attention_width(model, model.heads) // tensor + 2 * key_width(model, tensor)
    return model.hidden * width if mtp.kind == "eagle3" else 0


def blocks_of_module(mtp: MTPConfig) -> int:
    """Decoder blocks of one MTP module."""
    return 0 if mtp.kind in ("medusa", "notebook", "top") else mtp.blocks


def beside_flops(model: ModelConfig, mtp: MTPConfig, sequence_length: int, tensor: int = 1) -> int:
    """All depths together, what they need beside decoder blocks like the trunk's and the vocabulary; on all of `tensor` ranks."""
    beside, depth = beside_blocks(model, mtp), mtp.depth
    # No gradient goes to states that are constants, where no norm with a weight is between.
    constant = detaches(mtp) or mtp.freeze_trunk
    if mtp.kind == "eagle":
        return 6 * depth * beside - 2 * beside
    if mtp.kind == "eagle3":
        # Step s attends to s + 1 times the entries.
        attention = 12 * sequence_length * attention_width(model, model.heads) * (depth * (depth - 1) // 2)
        return (4 if constant else 6) * beside + 6 * depth * tensor * wider_attention(model, mtp, tensor) + attention
    return 6 * depth * beside


def tail_flops(model: ModelConfig, mtp: MTPConfig, sequence_length: int) -> int:
    """What follows the trunk's last layer: the MTP modules, and 1 + D projections onto the vocabulary."""
    assert model.vocab_size is not None
    blocks = mtp.depth * blocks_of_module(mtp) * block_flops(model, sequence_length)
    return blocks + beside_flops(model, mtp, sequence_length) + adversary_flops(model, mtp) + projection_flops(model, mtp)


def adversary_flops(model: ModelConfig, mtp: MTPConfig) -> int:
    """The discriminator: it learns from the trunk's state and each depth's, which need no gradient, and then from each depth's,
    which do, its own weights being constant."""
    if not has_adversary(mtp):
        return 0
    return model.hidden**2 * (4 + 8 * mtp.depth) + model.hidden * (6 + 10 * mtp.depth)


def projection_flops(model: ModelConfig, mtp: MTPConfig) -> int:
    """1 + D projections onto the vocabulary; detached depths form no gradient of the main head's matrix, and under a frozen trunk
    there is none, nor one of the main head's state; matrices of their own always have one. Depths may know a part of the
    vocabulary. Soft targets are another projection at each depth, forward only, and so are the model's own predictions."""
    assert model.vocab_size is not None
    main, drafted = 2 if mtp.freeze_trunk else 6, mtp.draft_vocabulary or model.vocab_size
    depth = 4 if (mtp.freeze_trunk or detaches(mtp)) and not owns_projections(mtp) else 6
    forward = 2 * (soft_targets(mtp) + predicts_tokens(mtp))
    return (main * model.vocab_size + (depth * drafted + forward * model.vocab_size) * mtp.depth) * model.hidden


def costs(config: TrainingRun) -> Costs:
    """``parallel.costs``, or by operations in units of one block's three passes without recomputation. Tensor ranks that share a
    key/value head compute it each, which counts as often."""
    given, frozen = config.parallel.costs, config.mtp.freeze_trunk
    if given:
        block = Work(*given[:3])
        return Costs(Work(block.forward, 0, 0) if frozen else block, Work(*given[3:]))
    model, mtp, length = config.model, config.mtp, config.train.sequence_length
    assert model.vocab_size is not None
    tensor = config.parallel.tensor
    matrices, attention = 2 * tensor * block_matrices(model, tensor), 4 * length * attention_width(model, model.heads)
    unit = 1 / block_flops(model, length)
    # Of attention's products, two are forward and four give the gradient of its inputs; it has no weights.
    block = Work(matrices + attention, matrices + 2 * attention, matrices) * unit
    join = (beside_flops(model, mtp, length, tensor) + adversary_flops(model, mtp)) / 3 * unit
    head = projection_flops(model, mtp) * unit
    # The head forms its gradients while it has the logits: in the forward pass.
    tail = block * (blocks_of_module(mtp) * mtp.depth) + Work(join, join, join) + Work(head, 0, 0)
    if frozen:
        block = Work(block.forward, 0, 0)
    elif config.train.recompute == "full":
        block += Work(0, block.forward, 0)
    return Costs(block, tail)
