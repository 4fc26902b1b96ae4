"""Blocks with fewer, wider products: query, key and value of a layer in one, gate and up in one, query and key turned together.

A pass over a few tokens of a small model spends its time between the products, so their number counts. Every output is the same
sum of the same terms. The new matrices take the place of the old ones; one block's at a time are held twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.model.attention import Mask, attend
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.trunk import Block, KeyValueCache, rotate


class FusedBlock(nn.Module):
    """Stands for a ``Block`` of a model in one process, in decoding: the same states."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.attention_norm, self.mlp_norm = block.attention_norm, block.mlp_norm
        self.output, self.down = attention.output, mlp.down
        self.heads, self.key_heads = (len(part.weight) // attention.head_dim for part in (attention.query, attention.key))
        self.head_dim = attention.head_dim
        self.register_buffer("inputs", joined(attention.query, attention.key, attention.value))
        self.register_buffer("gate_up", joined(mlp.gate, mlp.up))
        self.inputs: Tensor
        self.gate_up: Tensor

    def forward(self, x: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache) -> Tensor:
        """As ``Block.forward`` with a cache."""
        made = F.linear(self.attention_norm(x), self.inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned, value = rotate(made[:, : -self.key_heads], turn), made[:, -self.key_heads :]
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        key, value = cache.extend(key, value)
        x = x + self.output(attend(query, key, value, mask, causal=False).transpose(1, 2).flatten(2))
        gate, up = F.linear(self.mlp_norm(x), self.gate_up).chunk(2, dim=-1)
        down: Tensor = self.down(F.silu(gate) * up)
        return x + down


def joined(*layers: nn.Module) -> Tensor:
    """[outputs of all, inputs]."""
    return torch.cat([layer.weight.detach() for layer in layers])  # type: ignore[misc, operator]


def fuse(model: Chunk) -> None:
    """Replace every ``Block`` below ``model``."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Block):
                setattr(module, name, FusedBlock(child))
