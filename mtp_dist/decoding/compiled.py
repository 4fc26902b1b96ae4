"""Blocks whose arithmetic around attention is compiled: fewer, larger kernels for each new token.

Only what needs no cache: norm, projections and rotation before attention; output projection, residuals and feed-forward after it.
One compiled function serves all blocks (weights are its inputs), once for passes over one token and once for wider ones.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mtp_dist.decoding.replacement import replace
from mtp_dist.model.attention import Mask, attend
from mtp_dist.model.trunk import Block, KeyValueCache, rotate


class CompiledBlock(nn.Module):
    """Stands for a ``Block`` in decoding: the same states up to rounding."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache) -> Tensor:
        """As ``Block.forward`` with a cache."""
        query, key, value = _BEFORE(self.block, x, turn)
        key, value = cache.extend(key, value)
        result: Tensor = _AFTER(self.block, x, attend(query, key, value, mask, causal=False))
        return result


def compile_blocks(model: nn.Module) -> None:
    """Replace every ``Block`` below ``model``. The first passes over each shape then take seconds."""
    replace(model, Block, CompiledBlock)


def _before(block: Block, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = block.attention.project(block.attention_norm(x))
    return rotate(query, turn), rotate(key, turn), value


def _after(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.attention.output(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.mlp_norm(x))


_BEFORE: Any = torch.compile(_before)
_AFTER: Any = torch.compile(_after)
