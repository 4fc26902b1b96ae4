"""The output head as a module: what turns the states of all depths into one loss.

It is a module, and not a call of ``head_loss`` from the chunk, so that whoever shards parameters (ZeRO-3) knows when its matrix
is needed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mtp_dist.config.schema import ModelConfig
from mtp_dist.model.draft_tokens import DraftTokens
from mtp_dist.model.embedding import Embedding
from mtp_dist.model.head_loss import Order, Teacher, depth_losses, head_loss, likeliest, statistics
from mtp_dist.model.parameter import parameter
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.weight_gradients import WeightGradients

MATRIX = {True: "embedding.weight", False: "head.weight"}
"""Global name of the main head's matrix, by whether it is tied to the embedding."""


class OutputHead(nn.Module):
    """An output matrix of its own, for models that do not tie it to the embedding. Same shape and split as the embedding."""

    def __init__(self, model: ModelConfig, group: TensorGroup) -> None:
        super().__init__()
        assert model.vocab_size is not None
        self.weight = parameter((model.vocab_size, model.hidden), split=0, std=model.init_std, group=group)
        self.group = group

    def matrix(self) -> nn.Parameter:
        """[V/R, d]."""
        return self.weight

    def forward(
        self,
        states: list[Tensor],
        *,
        wanted: Tensor,
        scale: Tensor,
        queue: WeightGradients | None,
        main_only: bool = False,
        soft: bool = False,
        kept: DraftTokens | None = None,
        own: Sequence["OwnProjection"] = (),
        order: Order | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``head_loss``; soft: the first state and this head's matrix teach the depths; kept: the tokens that the
        depths know; own: the depths' own matrices, which learn from their losses whatever `main_only` says; order:
        the targets of such a matrix, instead of tokens."""
        matrix = self.matrix()
        teacher = Teacher(states[0], matrix) if soft else None
        if not own:
            return head_loss(states, matrix, wanted, scale, self.group, queue, main_only=main_only, teacher=teacher, kept=kept)
        found = [depth_losses(states[:1], matrix, wanted[..., :1], scale[:, :1], self.group, queue)]
        for k, (state, projection) in enumerate(zip(states[1:], own, strict=False), start=1):
            column = slice(k, k + 1)
            part = {"wanted": wanted[..., column], "scale": scale[:, column]}
            found.append(projection(state, k, **part, queue=queue, teacher=teacher, order=order))
        totals, sums, right = zip(*found, strict=True)
        table = statistics(torch.cat(sums), torch.cat(right, dim=-1), wanted, soft=soft)
        return torch.stack(totals).sum(), table


class OwnProjection(nn.Module):
    """The output matrix of one depth alone. `copy_of`, `stands_for`: as of ``ParameterSpec``."""

    def __init__(
        self, model: ModelConfig, group: TensorGroup, *, copy_of: str | None = None, stands_for: str | None = None
    ) -> None:
        super().__init__()
        assert model.vocab_size is not None
        shape = (model.vocab_size, model.hidden)
        self.weight = parameter(shape, split=0, std=model.init_std, group=group, copy_of=copy_of, stands_for=stands_for)
        self.group = group

    def forward(
        self,
        state: Tensor,
        k: int,
        *,
        wanted: Tensor,
        scale: Tensor,
        queue: WeightGradients | None,
        teacher: Teacher | None,
        order: Order | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``depth_losses`` for the one state [B, S, d] of depth k. The teacher's matrix must be at hand: the main head, which
        calls this, has it."""
        return depth_losses([state], self.weight, wanted, scale, self.group, queue, teacher=teacher, order=order, first=k)


class Predictor(nn.Module):
    """Names the likeliest token of each state, by the matrix of a head. A module, as ``OutputHead`` is one: it borrows the
    matrix, and owns no parameter."""

    def __init__(self, matrix: Callable[[], nn.Parameter], group: TensorGroup) -> None:
        super().__init__()
        self.matrix, self.group = matrix, group

    @property
    def borrowed(self) -> tuple[nn.Parameter, ...]:
        """Parameters of other modules that this one reads."""
        return (self.matrix(),)

    def forward(self, state: Tensor) -> Tensor:
        """state [B, S, d], or this rank's positions of it, ready for the head -> int64 [B, S], the same on each tensor rank."""
        return likeliest(self.group.whole_positions(state.detach()), self.matrix(), self.group)


class TiedHead(OutputHead):
    """The embedding's matrix as output head. It owns no parameter."""

    def __init__(self, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.group = embedding.group
        self._embedding = (embedding,)  # in a tuple, or the parameter would get a second name

    @property
    def borrowed(self) -> tuple[nn.Parameter, ...]:
        """Parameters of other modules that this one reads."""
        return (self.matrix(),)

    def matrix(self) -> nn.Parameter:
        return self._embedding[0].weight
