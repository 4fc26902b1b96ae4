"""Parallel heads (Gloeckle and others, arXiv 2404.19737, section 2): each depth a decoder stack of its own on one trunk state.

h^k = Block_k(z); the trunk's final norm and the output head, both shared, predict t[i+k+1] from it. `mtp.branch` says what z is:
`penultimate`, the state that enters the trunk's last block, so that this block is the main head's own as in the paper; or
`final`, the trunk's output. Depth k sees no token after t[i].
"""

from torch import Tensor, nn

from mtp_dist.config.heads import taps
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask
from mtp_dist.model.mtp.heads import Feed, Heads, TrunkStates, build_blocks, numbered
from mtp_dist.model.tensor_group import TensorGroup


class ParallelModule(nn.Module):
    """One depth: its blocks."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__()
        self.block = build_blocks(model, mtp, group)

    def forward(self, z: Tensor, turn: Tensor, mask: Mask) -> Tensor:
        """[B, n, d] -> [B, n, d]."""
        state: Tensor = self.block(z, turn, mask)
        return state


class ParallelHeads(Heads):
    """D modules side by side."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__(numbered(ParallelModule, model, mtp, group), mtp.depth)
        self.taps = taps(model, mtp)

    def forward(self, trunk: TrunkStates, feed: Feed, turn: Tensor, mask: Mask) -> list[Tensor]:
        z = trunk.taps[self.taps[0]] if self.taps else trunk.before_norm
        return [trunk.norm(module(z, turn, mask)) for module in self.asked()]
