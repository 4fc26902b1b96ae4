"""Medusa heads (Cai and others, arXiv 2401.10774, section 2.1.1).

h^k = x + SiLU(W_k x + b_k) with x = h⁰, the trunk's output after its final norm; `mtp.blocks` such residual blocks in a row. W_k
and b_k start as zeros. The paper gives each head a vocabulary projection of its own (`mtp.projection=own`), a copy of the main
one at the start; or all share the main one. Either way every head starts as the main one.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.config.heads import owns_projections
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask
from mtp_dist.model.linear import Affine
from mtp_dist.model.mtp.heads import Feed, Heads, TrunkStates, numbered
from mtp_dist.model.output import MATRIX, OwnProjection
from mtp_dist.model.tensor_group import TensorGroup


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), [B, n, d] -> [B, n, d]; position by position, whole on every tensor rank."""

    def __init__(self, hidden: int, group: TensorGroup) -> None:
        super().__init__()
        self.linear = Affine(hidden, hidden, std=0.0, group=group)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaModule(nn.Module):
    """One depth: its residual blocks, keyed "1" .. "r", and its vocabulary projection, which the loss calls."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__()
        self.block = nn.ModuleDict({str(r): ResidualBlock(model.hidden, group) for r in range(1, mtp.blocks + 1)})
        main = MATRIX[model.tie_embeddings]
        self.head = OwnProjection(model, group, copy_of=main, stands_for=main) if owns_projections(mtp) else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block.values():
            x = block(x)
        return x


class MedusaHeads(Heads):
    """D modules side by side."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__(numbered(MedusaModule, model, mtp, group), mtp.depth)

    def forward(self, trunk: TrunkStates, feed: Feed, turn: Tensor, mask: Mask) -> list[Tensor]:
        return [module(trunk.after_norm) for module in self.asked()]
