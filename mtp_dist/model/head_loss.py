"""The output head and its cross-entropy over all depths: chunked, vocabulary-parallel, gradient computed in the forward pass.

Logits are never whole: the shared head runs over chunks of positions, one depth at a time, and each chunk's gradient is formed
while its logits exist. One float32 buffer of the head's own shape holds its gradient for the main head and all depths, so head
memory does not grow with D. Under tensor parallelism every rank holds a slice of the vocabulary and sees the same states, which
have been through ``TensorGroup.enter``: what comes back for them is this slice's share of the gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_dist.model.parameter import spec_of
from mtp_dist.model.targets import IGNORE
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.weight_gradients import WeightGradients, accumulate

STATISTICS = ("loss_sum", "correct", "prefix_correct", "prefix_valid")
"""Columns of the second result of ``head_loss``, sums over this micro-batch: unweighted loss; targets predicted right (top 1);
targets right with all earlier depths of the same position right; targets whose earlier depths are all right (the denominator of
the conditional accuracy)."""

LOGITS_IN_FLIGHT = 1 << 22
"""Logits computed at once, in elements: 16 MiB as float32."""


def head_loss(
    states: list[Tensor],
    weight: nn.Parameter,
    wanted: Tensor,
    scale: Tensor,
    group: TensorGroup,
    queue: WeightGradients | None,
    *,
    main_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """states: 1+D tensors [B, S, d]; weight [V/R, d] (where R > 1: of ``parameter``); wanted: ``targets`` [B, S, 1+D]; scale
    float32 [B, 1+D].
    main_only: of the losses only the first, the main head's, gives the weight a gradient; the states get all of theirs.

    Returns (float32 scalar: sum over valid targets of scale[b, k] * cross-entropy, float32 [1+D, 4]: ``STATISTICS``).
    """
    # A Function cannot tell: a parameter needs a gradient for it even where gradients are off.
    return _HeadLoss.apply(weight, wanted, scale, _Share.of(weight, group), queue, torch.is_grad_enabled(), main_only, *states)


@dataclass(frozen=True)
class _Share:
    """This rank's rows of the vocabulary: from `first` on. `most`: rows of the rank with most; ranks must cut positions alike."""

    group: TensorGroup
    first: int
    most: int

    @staticmethod
    def of(weight: nn.Parameter, group: TensorGroup) -> "_Share":
        if group.size == 1:
            return _Share(group, 0, weight.shape[0])
        spec = spec_of(weight)
        return _Share(group, spec.start[0], spec.largest_share)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: nn.Parameter,
        wanted: Tensor,
        scale: Tensor,
        share: _Share,
        queue: WeightGradients | None,
        learn: bool,
        main_only: bool,
        *states: Tensor,
    ) -> tuple[Tensor, Tensor]:
        learn_weight = learn and ctx.needs_input_grad[0]
        # One by one: under a frozen trunk the main head's state needs none, the MTP modules' states do.
        learn_states = [learn and needed for needed in ctx.needs_input_grad[7:]]
        rows, width = wanted.shape[0] * wanted.shape[1], states[0].shape[-1]
        ctx.weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if learn_weight else None
        ctx.state_gradients = [
            torch.empty_like(state, memory_format=torch.contiguous_format) if needed else None
            for state, needed in zip(states, learn_states, strict=True)
        ]
        row_scale = scale.unsqueeze(1).expand(-1, wanted.shape[1], -1).flatten(0, 1)
        step = max(1, LOGITS_IN_FLIGHT // share.most)
        total = torch.zeros((), dtype=torch.float32, device=weight.device)
        statistics = torch.zeros(len(states), len(STATISTICS), dtype=torch.float32, device=weight.device)
        earlier_right = torch.ones(rows, dtype=torch.bool, device=weight.device)
        for k, state in enumerate(states):
            teaches_weight = learn_weight and not (main_only and k > 0)
            hidden, target = state.reshape(rows, width), wanted[..., k].flatten()
            for begin in range(0, rows, step):
                part = slice(begin, min(rows, begin + step))
                valid = target[part] != IGNORE
                weights = row_scale[part, k] * valid
                loss, right, slope = _chunk(
                    hidden[part], weight, target[part], weights if teaches_weight or learn_states[k] else None, share
                )
                loss = torch.where(valid, loss, 0.0)
                right &= valid
                base = valid & earlier_right[part]
                earlier_right[part] &= right
                total += (loss * weights).sum()
                statistics[k] += torch.stack((loss.sum(), right.sum(), earlier_right[part].sum(), base.sum())).float()
                if slope is None:
                    continue
                if learn_states[k]:
                    torch.mm(slope, weight, out=ctx.state_gradients[k].view(rows, width)[part])
                if teaches_weight:
                    ctx.weight_gradient += slope.T @ hidden[part]
        ctx.weight, ctx.queue = weight, queue
        ctx.mark_non_differentiable(statistics)
        return total, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        states = [None if gradient is None else gradient.mul_(upstream) for gradient in ctx.state_gradients]
        weight: Tensor | None = None
        if ctx.weight_gradient is not None:
            gradient = ctx.weight_gradient.mul_(upstream)
            if ctx.queue is None:
                weight = gradient.to(ctx.weight.dtype)
            else:
                ctx.queue.add(lambda target=ctx.weight: accumulate(target, gradient))
        ctx.weight = ctx.weight_gradient = None
        ctx.state_gradients = []
        return weight, None, None, None, None, None, None, *states


def _chunk(
    hidden: Tensor, weight: Tensor, target: Tensor, weights: Tensor | None, share: _Share
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [n, d], target [n] -> (cross-entropy float32 [n], top-1 right bool [n], d(weighted loss)/d(logits) [n, V/R] or
    None)."""
    logits = (hidden @ weight.T).float()
    group, rows = share.group, logits.shape[1]
    local = target - share.first
    here = (local >= 0) & (local < rows)
    local = local.clamp(0, rows - 1).unsqueeze(1)
    top, best = logits.max(dim=1)
    if group.size > 1:
        own_top = top.clone()
        group.all_reduce(top, dist.ReduceOp.MAX)
        # The smallest index among the ranks that hold the maximum, as argmax over the whole row would find.
        best = torch.where(own_top == top, best + share.first, torch.iinfo(torch.int64).max)
        group.all_reduce(best, dist.ReduceOp.MIN)
    wanted_logit = torch.where(here, logits.gather(1, local).squeeze(1) - top, 0.0)
    exponential = logits.sub_(top.unsqueeze(1)).exp_()
    sums = group.all_reduce(torch.stack((exponential.sum(1), wanted_logit)))
    loss = sums[0].log() - sums[1]
    if weights is None:
        return loss, best == target, None
    slope = exponential.mul_((weights / sums[0]).unsqueeze(1))
    slope.scatter_add_(1, local, torch.where(here, -weights, 0.0).unsqueeze(1))
    return loss, best == target, slope.to(hidden.dtype)
