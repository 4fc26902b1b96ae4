"""EAGLE (Li and others, arXiv 2401.15077, sections 4.1 and 4.2): a head that draws the trunk's own states ahead.

f̂[i+k] = Block(W [Emb(t[i+k]) ; f̂[i+k-1]]) with f̂[i] = f_i, causal over i: one module for every depth, fed its own states from
depth 2 on, as a draft is. Each f̂[i+k] is taught to equal the trunk's f[i+k] (``model/feature_loss.py``) and, less so, to make
the output head say the same; it counts where i + k is a position of the row, so that f[i+k] is there. f is the state that the
output head reads (`mtp.h0=post_norm`, as in the released code), or the one before the final norm, which then follows each f̂.

The paper trains on a frozen trunk. Here the head's losses never reach trunk, embedding or output head, frozen or not: where the
trunk learns, too, it learns from the main loss alone, and the head follows it. The block is one of the trunk's, both norms
included; the released code leaves the first one out.
"""

import torch
from torch import Tensor, nn

from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask
from mtp_dist.model.linear import Linear
from mtp_dist.model.mtp.heads import Feed, Heads, TrunkStates, build_blocks
from mtp_dist.model.tensor_group import TensorGroup


class EagleModule(nn.Module):
    """`projection` is W, `block` Block of the definition above."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__()
        self.projection = Linear(2 * model.hidden, model.hidden, std=model.init_std, group=group)
        self.block = build_blocks(model, mtp, group)
        self.embedding_first = mtp.concat == "embedding_first"

    def forward(self, feature: Tensor, embedded: Tensor, turn: Tensor, mask: Mask) -> Tensor:
        """f̂[i+k-1] and Emb(t[i+k]) -> f̂[i+k], all [B, n, d]."""
        parts = (embedded, feature)
        state: Tensor = self.block(self.projection(torch.cat(parts if self.embedding_first else parts[::-1], dim=-1)), turn, mask)
        return state


class EagleHeads(Heads):
    """One module, D times."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__({"1": EagleModule(model, mtp, group)}, mtp.depth)
        self.normed = mtp.h0 == "post_norm"

    def forward(self, trunk: TrunkStates, feed: Feed, turn: Tensor, mask: Mask) -> list[Tensor]:
        feature, states = self.imitated(trunk), []
        for k in range(1, self.computed + 1):
            feature = self["1"](feature, feed(k, feature), turn, mask)
            states.append(feature)
        return states

    def imitated(self, trunk: TrunkStates) -> Tensor:
        return trunk.after_norm if self.normed else trunk.before_norm

    def ready(self, state: Tensor, trunk: TrunkStates) -> Tensor:
        return state if self.normed else trunk.norm(state)
