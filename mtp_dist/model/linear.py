"""Linear layers: whole, column-parallel or row-parallel (arXiv 1909.08053), with optional deferred weight gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.model.parameter import parameter
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.weight_gradients import WeightGradients, accumulate


class Linear(nn.Module):
    """y [.., outputs] = x [.., inputs] Wᵀ.

    `split` 0 (column-parallel): this rank computes its slice of the outputs; its input has been through ``TensorGroup.enter``.
    `sharers`: that many neighbours compute the same slice (see ``ParameterSpec``), each for its own use of it; each then has a
    part of the weight gradient, and the parts are summed before the optimizer's step.
    `split` 1 (row-parallel): it holds a slice of the inputs; its output has been through ``leave``. None: each rank has it whole.
    """

    def __init__(
        self, inputs: int, outputs: int, *, std: float, group: TensorGroup, split: int | None = None, sharers: int = 1
    ) -> None:
        super().__init__()
        self.weight = parameter((outputs, inputs), split=split, std=std, group=group, sharers=sharers)
        self.weight_gradients: WeightGradients | None = None
        self.group, self.split = group, split

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_gradients is None or not torch.is_grad_enabled():
            y = F.linear(x, self.weight)
        else:
            y = _DeferredLinear.apply(x, self.weight, self.weight_gradients)
        return self.group.leave(y) if self.split == 1 else y


class Affine(Linear):
    """W x + b, whole on each tensor rank; b starts as zeros. One module has both: ZeRO-3 shards module by module."""

    def __init__(self, inputs: int, outputs: int, *, std: float, group: TensorGroup) -> None:
        super().__init__(inputs, outputs, std=std, group=group)
        self.bias = parameter((outputs,), split=None, std=0.0, group=group)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved as a tensor: activation checkpointing hands those back detached, and the gradient belongs to the parameter.
        ctx.weight, ctx.queue = weight, queue
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), weight, grad = ctx.saved_tensors, ctx.weight, grads[0]
        if ctx.needs_input_grad[1]:
            ctx.queue.add(lambda: accumulate(weight, grad.flatten(0, -2).T @ x.flatten(0, -2)))
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None
