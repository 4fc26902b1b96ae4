"""The tensor-parallel group that a module is handed, and the two collectives around its split matrices.

`enter` stands before column-parallel layers, `leave` after row-parallel ones: f and g of Megatron (arXiv 1909.08053, section
3), or with sequence parallelism g-bar and its converse (arXiv 2205.05198, section 4.2.2), where between `leave` and `enter`
each rank holds its share of the positions. Without it activations there are replicated: every rank holds the same values, and
replicated parameters get the same gradient on every rank; with it their gradients are partial and must be summed over the
group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorGroup:
    """Ranks that split every matrix. `process_group` is None when there is one; `sequence`: sequence parallelism."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    sequence: bool = False

    @property
    def shares_positions(self) -> bool:
        """Whether each rank holds its share of the positions outside split matrices."""
        return self.sequence and self.size > 1

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """In place, no gradient."""
        if self.size > 1:
            dist.all_reduce(x, op=op, group=self.process_group)
        return x

    def enter(self, x: Tensor) -> Tensor:
        """[B, S or S/R, d] -> [B, S, d], the same on every rank; the gradient is summed over the ranks."""
        if self.size == 1:
            return x
        return _Gather.apply(x, self) if self.sequence else _Replicate.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums [B, S, d] -> their sum over the ranks, [B, S, d] or this rank's positions of it, [B, S/R, d]."""
        if self.size == 1:
            return x
        return _Scatter.apply(x, self) if self.sequence else _Sum.apply(x, self)

    def whole_positions(self, x: Tensor) -> Tensor:
        """[B, S or S/R, ..] -> [B, S, ..], no gradient."""
        return _all_gather(x, self) if self.shares_positions else x

    def stacked(self, x: Tensor) -> Tensor:
        """x of every rank, of the same shape on each -> [R, ..], no gradient."""
        if self.size == 1:
            return x.unsqueeze(0)
        whole = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(whole, x.contiguous(), group=self.process_group)
        return whole.unflatten(0, (self.size, -1))

    def own_positions(self, length: int) -> slice:
        """Which of `length` positions this rank holds outside split matrices."""
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share) if self.shares_positions else slice(0, length)


ALONE = TensorGroup()


def _all_gather(x: Tensor, group: TensorGroup) -> Tensor:
    """[B, s, ..] of each rank -> [B, R s, ..]."""
    return group.stacked(x).movedim(0, 1).flatten(1, 2)


def _reduce_scatter(x: Tensor, group: TensorGroup) -> Tensor:
    """Partial sums [B, R s, ..] -> this rank's positions of the sum, [B, s, ..]."""
    parts = x.unflatten(1, (group.size, -1)).movedim(1, 0).contiguous()
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group.process_group)
    return own


def _sum(x: Tensor, group: TensorGroup) -> Tensor:
    return group.all_reduce(x.clone(memory_format=torch.contiguous_format))


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grads[0], ctx.group), None
