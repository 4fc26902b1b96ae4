"""Activation checkpointing: what of a block's forward pass is kept for its backward pass.

none keeps everything; full keeps the block's input and runs it again; selective keeps the results of matrix products and of
attention, which are dear to compute, and runs the rest again (norms, rotations, activations, casts).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from mtp_dist.model.attention import Mask
from mtp_dist.model.trunk import Block

# By name: varlen attention is loaded only where it runs.
_KEPT = {
    "aten.mm.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "torch_attn._varlen_attn.default",
}


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operator) in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def run_block(block: Block, hidden: Tensor, turn: Tensor, mask: Mask, kind: str) -> Tensor:
    """The block's output [B, n, d], kept or computed again as `kind` says. Blocks draw no random numbers."""
    if kind == "none" or not torch.is_grad_enabled():
        return block(hidden, turn, mask)
    contexts = _contexts if kind == "selective" else noop_context_fn
    return checkpoint(block, hidden, turn, mask, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
