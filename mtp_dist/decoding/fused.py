"""Blocks with fewer, wider products: query, key and value of a layer in one, gate and up in one, query and key turned together.

A pass over a few tokens of a small model spends its time between the products, so their number counts. Every output is the same
sum of the same terms. The new matrices take the place of the old ones; one block's at a time are held twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.decoding.product import Product
from mtp_dist.decoding.replacement import replace
from mtp_dist.model.attention import Mask, attend
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.linear import Linear
from mtp_dist.model.trunk import Block, KeyValueCache, RMSNorm, rotate


class FusedBlock(nn.Module):
    """Stands for a ``Block`` of a model in one process, in decoding: the same states. It holds no parameter, and stays on its
    device."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.attention_norm, self.mlp_norm = block.attention_norm, block.mlp_norm
        self.heads, self.key_heads = (len(part.weight) // attention.head_dim for part in (attention.query, attention.key))
        self.head_dim = attention.head_dim
        self.inputs, self.output = joined(attention.query, attention.key, attention.value), joined(attention.output)
        self.gate_up, self.down = joined(mlp.gate, mlp.up), joined(mlp.down)

    def forward(self, x: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache) -> Tensor:
        """As ``Block.forward`` with a cache."""
        made = self.inputs(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned, value = rotate(made[:, : -self.key_heads], turn), made[:, -self.key_heads :]
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        key, value = cache.extend(key, value)
        x = x + self.output(attend(query, key, value, mask, causal=False).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Norm(nn.Module):
    """Stands for an ``RMSNorm`` on CPU, without its own gradient: it is the layer norm of (x, -x), whose mean is 0 and whose
    variance is x's mean square. For that torch has one kernel, for its own RMSNorm many, which took twice as long."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.width, self.eps = len(norm.weight), norm.eps
        self.register_buffer("weight", torch.cat((norm.weight, norm.weight)).detach())
        self.weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(torch.cat((x, -x), -1), (2 * self.width,), self.weight, None, self.eps)[..., : self.width]


def joined(*layers: Linear) -> Product:
    """The layers' outputs, one behind the other."""
    weights = [layer.weight.detach() for layer in layers]
    return Product(weights[0] if len(weights) == 1 else torch.cat(weights))


def fuse(model: Chunk) -> None:
    """Replace every ``Block`` below ``model``, and on CPU every ``RMSNorm``."""
    replace(model, Block, FusedBlock)
    if model.device.type == "cpu":
        replace(model, RMSNorm, Norm)
