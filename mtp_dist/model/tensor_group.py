"""The tensor-parallel group that a module is handed, and the two collectives of Megatron's f and g (arXiv 1909.08053, section 3).

A module built with ``ALONE`` is a plain one-process module. Between column- and row-parallel layers activations are
replicated: every rank of the group holds the same values, so replicated parameters get the same gradient on every rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorGroup:
    """Ranks that split every matrix. ``process_group`` is None when there is one."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """In place, no gradient."""
        if self.size > 1:
            dist.all_reduce(x, op=op, group=self.process_group)
        return x

    def enter(self, x: Tensor) -> Tensor:
        """f: identity forward, sum of the gradients backward. Before a column-parallel layer."""
        return _Enter.apply(x, self) if self.size > 1 else x

    def leave(self, x: Tensor) -> Tensor:
        """g: sum forward, identity backward. After a row-parallel layer."""
        return _Leave.apply(x, self) if self.size > 1 else x


ALONE = TensorGroup()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grads[0].clone(memory_format=torch.contiguous_format)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
