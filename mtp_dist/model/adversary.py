"""The adversarial term of KOALA (Zhang and others, arXiv 2408.08146), built from the paper's abstract alone.

The abstract says that several layers take the place of a draft head's one (`mtp.blocks`) and that adversarial learning joins the
supervised one; it does not say how. What follows is this project's own reading, the simplest that the harness can carry:

- A discriminator z(x) = v SiLU(U x) tells which of two states ready for the output head is the trunk's: h⁰[i+k], or depth k's
  h^k[i], which stand for the same target. It reads states [d] instead of distributions [V]: all depths share the main head's
  matrix, so equal states are equal distributions. Hence `mtp.projection=shared` and `mtp.targets=trunk`. One discriminator serves
  all depths.
- It learns softplus(-z(h⁰)) + softplus(z(h^k)) on states held constant; the heads learn softplus(-z(h^k)) from a discriminator
  held constant (the non-saturating game of arXiv 1406.2661). The state that stands for the trunk gets no gradient. Both are parts
  of one loss, so one backward pass and one optimizer serve the two players.
- Both are summed over the valid targets of a depth, weighted as its cross-entropy is, times `mtp.adversarial`.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.config.schema import ModelConfig
from mtp_dist.model.parameter import parameter
from mtp_dist.model.targets import IGNORE
from mtp_dist.model.tensor_group import TensorGroup


class Adversary(nn.Module):
    """The discriminator. U [d, d] and v [1, d] are split over tensor ranks by U's rows."""

    def __init__(self, model: ModelConfig, group: TensorGroup) -> None:
        super().__init__()
        # The states that it is handed are whole: its sums are over ranks, not over shares of the positions.
        self.group = replace(group, sequence=False)
        self.inner = parameter((model.hidden, model.hidden), split=0, std=model.init_std, group=self.group)
        self.score = parameter((1, model.hidden), split=1, std=model.init_std, group=self.group)

    def forward(self, states: list[Tensor], wanted: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """states: h⁰ and h^1 .. h^D [B, S, d], through ``TensorGroup.enter``; wanted ``targets`` [B, S, 1+D], `inside`; scale
        float32 [B, 1+D].

        Returns (float32 scalar: what both players minimise, times scale; float32 [1+D]: sums over valid targets of what the
        discriminator minimises, 2 ln 2 each where it cannot tell; 0 for the main head). The same on every tensor rank.
        """
        true = F.softplus(-self._tell(states[0].detach()))
        total, sums = true.new_zeros(()), [true.new_zeros(())]
        for k, state in enumerate(states[1:], start=1):
            valid = wanted[..., k] != IGNORE
            # Where i+k is past the end another position stands in: such targets do not count.
            telling = true.roll(-k, 1) + F.softplus(self._tell(state.detach()))
            fooling = F.softplus(-self._tell(state, learn=False))
            total = total + ((telling + fooling) * (scale[:, k : k + 1] * valid)).sum()
            sums.append((telling.detach() * valid).sum())
        return total, torch.stack(sums)

    def _tell(self, x: Tensor, *, learn: bool = True) -> Tensor:
        """x [B, n, d] -> z float32 [B, n]: large where it takes x for the trunk's. learn=False: its weights get no gradient."""
        inner, score = (self.inner, self.score) if learn else (self.inner.detach(), self.score.detach())
        return self.group.leave(F.linear(F.silu(F.linear(x, inner)), score)).squeeze(-1).float()
