"""The token embedding, split over the tensor-parallel group by vocabulary rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.model.parameter import parameter, spec_of
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.weight_gradients import WeightGradients, gradient_of


class Embedding(nn.Module):
    """tokens int64 [..] -> [.., hidden]. Each rank holds a share of the rows (see ``ParameterSpec``)."""

    def __init__(
        self, vocabulary: int, hidden: int, *, std: float, group: TensorGroup, stands_for: str | None = None
    ) -> None:
        """`stands_for`: as of ``ParameterSpec``."""
        super().__init__()
        self.weight = parameter((vocabulary, hidden), split=0, std=std, group=group, stands_for=stands_for)
        self.weight_gradients: WeightGradients | None = None
        self.group = group
        self.first_row = spec_of(self.weight).start[0]

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = tokens - self.first_row
        elsewhere = (local < 0) | (local >= rows)
        local = local.masked_fill(elsewhere, 0)
        if self.weight_gradients is None or not torch.is_grad_enabled():
            found = F.embedding(local, self.weight)
        else:
            found = _DeferredEmbedding.apply(self.weight, local, elsewhere, self.weight_gradients)
        return self.group.leave(found.masked_fill(elsewhere.unsqueeze(-1), 0)) if self.group.size > 1 else found


class _DeferredEmbedding(torch.autograd.Function):
    """Adds row gradients straight into the accumulation buffer: autograd's would build a dense V x d matrix in the weight's dtype
    for every look-up, and sum a frequent token's gradients in bfloat16."""

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, tokens: Tensor, elsewhere: Tensor, queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(tokens, elsewhere)
        ctx.weight, ctx.queue = weight, queue
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        (tokens, elsewhere), weight, grad = ctx.saved_tensors, ctx.weight, grads[0]

        def add_rows() -> None:
            buffer = gradient_of(weight)
            rows = grad.masked_fill(elsewhere.unsqueeze(-1), 0).flatten(0, -2).to(buffer.dtype)
            buffer.index_add_(0, tokens.flatten(), rows)

        if ctx.needs_input_grad[0]:
            ctx.queue.add(add_rows)
        return None, None, None, None
