"""Weight gradients computed outside autograd: later (zero-bubble schedules run them in their W slot) and in the accumulation
dtype.

A layer that is handed a ``WeightGradients`` queue puts its weight-gradient computation there during backward; one that is
handed None leaves it to autograd. Torch's own split of backward fails where a parameter reaches the loss by several paths
(the shared embedding, several heads); a queue does not care.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WeightGradients:
    """Pending weight gradients of one chunk, oldest first."""

    def __init__(self) -> None:
        self._pending: list[Callable[[], None]] = []

    def add(self, job: Callable[[], None]) -> None:
        self._pending.append(job)

    def take(self) -> Callable[[], None]:
        """All that is pending, as one function to run in the W slot. Signature of ``PipelineStage(dw_builder=...)``."""
        jobs, self._pending = self._pending, []

        def run() -> None:
            for job in jobs:
                job()

        return run


def gradient_of(weight: nn.Parameter) -> Tensor:
    """The gradient buffer of a weight, in its accumulation dtype, zeros if there is none yet."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype or weight.dtype)
    return weight.grad


def accumulate(weight: nn.Parameter, gradient: Tensor) -> None:
    """weight.grad += gradient, without a first addition to zeros."""
    if weight.grad is None:
        weight.grad = gradient.to(weight.grad_dtype or weight.dtype)
    else:
        weight.grad += gradient


def hand_out(module: nn.Module, queue: WeightGradients | None) -> None:
    """Give every layer below `module` that can use it the queue."""
    for layer in module.modules():
        if hasattr(layer, "weight_gradients"):
            layer.weight_gradients = queue  # type: ignore[assignment]
