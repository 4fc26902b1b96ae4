"""Floating-point operations of the model's parts, for one trained position, forward and backward. Pure arithmetic on resolved
settings.

6 for each matrix element that a position passes, and 12 S H c a block for attention, causality not deducted (arXiv 2204.02311,
appendix B).
"""

from mtp_dist.config.schema import ModelConfig, MTPConfig


def attention_width(model: ModelConfig, heads: int) -> int:
    """H c: width of all `heads` together."""
    assert model.head_dim is not None
    return heads * model.head_dim


def block_matrices(model: ModelConfig) -> int:
    """Matrix elements of one decoder block."""
    queries, keys = attention_width(model, model.heads), attention_width(model, model.kv_heads)
    return model.hidden * (2 * queries + 2 * keys + 3 * model.mlp)


def block_flops(model: ModelConfig, sequence_length: int) -> int:
    """One decoder block."""
    return 6 * block_matrices(model) + 12 * sequence_length * attention_width(model, model.heads)


def tail_flops(model: ModelConfig, mtp: MTPConfig, sequence_length: int) -> int:
    """What follows the trunk's last layer: the MTP modules, and 1 + D projections onto the vocabulary."""
    assert model.vocab_size is not None
    modules = mtp.depth * (block_flops(model, sequence_length) + 6 * 2 * model.hidden**2)
    return modules + (1 + mtp.depth) * 6 * model.vocab_size * model.hidden
