"""The output head and its cross-entropy over all depths: chunked, vocabulary-parallel, gradient computed in the forward pass.

Logits are never whole: the shared head runs over chunks of positions, one depth at a time, and each chunk's gradient is formed
while its logits exist. One float32 buffer of the head's own shape holds its gradient for the main head and all depths, so head
memory does not grow with D. Under tensor parallelism every rank holds a slice of the vocabulary and sees the same states, which
have been through ``TensorGroup.enter``: what comes back for them is this slice's share of the gradient.

A target is a token, or with a ``Teacher`` the whole distribution that the trunk's main head gives k positions further on
(self-distillation): what a draft of depth k will be held against. Its logits, too, exist a chunk at a time.

The depths may know a part of the vocabulary only, the first `kept` tokens: their softmax is over those. A target beyond them has
no loss, be it a token or what a teacher gives to others, and is not right; but it stays among those that means are taken of, so
an accuracy is still that of a decoder. (EAGLE-3's code leaves a target out whole where the teacher's likeliest token is beyond: a
near tie then decides about a term of the loss.) Tensor ranks have unequal shares of the work: those that hold the last rows,
none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
the conditional accuracy).

Right is the depth whose likeliest token is the target; with a teacher: the teacher's likeliest token, which is when a greedy
decoder would accept the draft. A prefix then begins at depth 1, as the main head is the teacher."""

LOGITS_IN_FLIGHT = 1 << 22
"""Logits computed at once, in elements: 16 MiB as float32."""


@dataclass(frozen=True)
class Teacher:
    """Soft targets: depth k >= 1 at position i learns softmax(`weight` `state`[i+k]), the main head (depth 0) the token as ever.

    `state` [B, S, d]: the trunk's, whole as the others are; `weight`: the main head's. Neither gets a gradient from it.
    """

    state: Tensor
    weight: nn.Parameter


@dataclass(frozen=True)
class Order:
    """Several targets a position, as ``upcoming`` gives them: `tokens` int64 [B, S, W], `shares` float32 [B, S, W] of sum 1."""

    tokens: Tensor
    shares: Tensor


def head_loss(
    states: list[Tensor],
    weight: nn.Parameter,
    wanted: Tensor,
    scale: Tensor,
    group: TensorGroup,
    queue: WeightGradients | None,
    *,
    main_only: bool = False,
    teacher: Teacher | None = None,
    kept: int | None = None,
) -> tuple[Tensor, Tensor]:
    """states: 1+D tensors [B, S, d]; weight [V/R, d] (where R > 1: of ``parameter``); wanted: ``targets`` [B, S, 1+D]; scale
    float32 [B, 1+D].
    main_only: of the losses only the first, the main head's, gives the weight a gradient; the states get all of theirs.
    teacher: then `wanted` only says which targets count, and must leave out (`inside`) those beyond the last position.
    kept: tokens that the depths >= 1 know, from the first on; None: all.

    Returns (float32 scalar: sum over valid targets of scale[b, k] * cross-entropy, float32 [1+D, 4]: ``STATISTICS``).
    """
    total, sums, right = depth_losses(
        states, weight, wanted, scale, group, queue, main_only=main_only, teacher=teacher, kept=kept
    )
    return total, statistics(sums, right, wanted, soft=teacher is not None)


def depth_losses(
    states: list[Tensor],
    weight: nn.Parameter,
    wanted: Tensor,
    scale: Tensor,
    group: TensorGroup,
    queue: WeightGradients | None,
    *,
    main_only: bool = False,
    teacher: Teacher | None = None,
    kept: int | None = None,
    order: Order | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``head_loss``, for depths that share a matrix: n states of depths `first`, `first` + 1 ..., with their n columns of
    `wanted` and `scale`. order: their targets, then `wanted` only says where they count.

    Returns (the weighted sum, float32 [n]: unweighted sums over valid targets, bool [B, S, n]: which targets are right).
    """
    # A Function cannot tell: a parameter needs a gradient for it even where gradients are off.
    learn = torch.is_grad_enabled()
    if teacher is not None:
        teacher = Teacher(teacher.state.detach(), teacher.weight)
    share = _Share.of(weight, group)
    options = _Options(share, share if kept is None else share.of_first(kept), queue, learn, main_only, teacher, order, first)
    return _HeadLoss.apply(weight, wanted, scale, options, *states)


def statistics(sums: Tensor, right: Tensor, wanted: Tensor, *, soft: bool) -> Tensor:
    """``STATISTICS`` float32 [1+D, 4] of all depths from what ``depth_losses`` says of each, `wanted` being all columns."""
    rows, earlier = [], torch.ones_like(right[..., 0])
    for k in range(len(sums)):
        base = (wanted[..., k] != IGNORE) & earlier
        rows.append(torch.stack((right[..., k].sum(), (base & right[..., k]).sum(), base.sum())))
        if k > 0 or not soft:
            earlier = earlier & right[..., k]
    return torch.cat((sums.unsqueeze(1), torch.stack(rows).float()), dim=1)


@dataclass(frozen=True)
class _Share:
    """This rank's rows of the vocabulary: from `first` on. `most`: rows of the rank with most; ranks must cut positions alike.
    `kept`: tokens that count, None for all."""

    group: TensorGroup
    first: int
    most: int
    kept: int | None = None

    @staticmethod
    def of(weight: nn.Parameter, group: TensorGroup) -> "_Share":
        if group.size == 1:
            return _Share(group, 0, weight.shape[0])
        spec = spec_of(weight)
        return _Share(group, spec.start[0], spec.largest_share)

    def of_first(self, kept: int) -> "_Share":
        return replace(self, most=min(self.most, kept), kept=kept)

    def rows(self, weight: Tensor) -> Tensor:
        """Those of the matrix [V/R, d] that count; one at least, which ``hide`` takes back."""
        return weight if self.kept is None else weight[: max(1, self.kept - self.first)]

    def hide(self, logits: Tensor) -> Tensor:
        """A rank without a row that counts says something impossible, yet finite: 0 times it must be 0."""
        return logits.fill_(-1e30) if self.kept is not None and self.kept <= self.first else logits


@dataclass(frozen=True)
class _Options:
    """`share` is the main head's, `drafts` that of the depths."""

    share: _Share
    drafts: _Share
    queue: WeightGradients | None
    learn: bool
    main_only: bool
    teacher: Teacher | None
    order: Order | None
    first: int


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: nn.Parameter, wanted: Tensor, scale: Tensor, options: _Options, *states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher = options.teacher
        learn_weight = options.learn and ctx.needs_input_grad[0]
        # One by one: under a frozen trunk the main head's state needs none, the MTP modules' states do.
        learn_states = [options.learn and needed for needed in ctx.needs_input_grad[4:]]
        rows, width = wanted.shape[0] * wanted.shape[1], states[0].shape[-1]
        ctx.weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if learn_weight else None
        ctx.state_gradients = [
            torch.empty_like(state, memory_format=torch.contiguous_format) if needed else None
            for state, needed in zip(states, learn_states, strict=True)
        ]
        row_scale = scale.unsqueeze(1).expand(-1, wanted.shape[1], -1).flatten(0, 1)
        total = torch.zeros((), dtype=torch.float32, device=weight.device)
        sums = torch.zeros(len(states), dtype=torch.float32, device=weight.device)
        all_right = torch.empty(rows, len(states), dtype=torch.bool, device=weight.device)
        for column, state in enumerate(states):
            k = options.first + column
            share = options.drafts if k > 0 else options.share
            matrix = share.rows(weight)
            taught = teacher.state.reshape(rows, width) if teacher is not None and k > 0 else None
            # A teacher's logits are in flight beside the head's own.
            step = max(1, LOGITS_IN_FLIGHT // (share.most if taught is None else share.most + options.share.most))
            teaches_weight = learn_weight and not (options.main_only and k > 0)
            hidden, target = state.reshape(rows, width), wanted[..., column].flatten()
            for begin in range(0, rows, step):
                part = slice(begin, min(rows, begin + step))
                valid = target[part] != IGNORE
                known = valid if taught is not None or share.kept is None else valid & (target[part] < share.kept)
                weights = row_scale[part, column] * known
                asked = weights if teaches_weight or learn_states[column] else None
                if options.order is not None:
                    places = (options.order.tokens.flatten(0, 1)[part], options.order.shares.flatten(0, 1)[part])
                    loss, right, slope = _order_chunk(hidden[part], matrix, *places, asked, share)
                elif taught is None:
                    loss, right, slope = _chunk(hidden[part], matrix, target[part], asked, share)
                else:
                    assert teacher is not None
                    # Past the end of a row stands another one: such targets do not count.
                    ahead = torch.arange(part.start + k, part.stop + k, device=weight.device).clamp(max=rows - 1)
                    loss, right, slope = _soft_chunk(hidden[part], matrix, taught[ahead], teacher.weight, asked, share)
                loss = torch.where(known, loss, 0.0)
                all_right[part, column] = right & valid
                total += (loss * weights).sum()
                sums[column] += loss.sum()
                if slope is None:
                    continue
                if learn_states[column]:
                    torch.mm(slope, matrix, out=ctx.state_gradients[column].view(rows, width)[part])
                if teaches_weight:
                    ctx.weight_gradient[: len(matrix)] += slope.T @ hidden[part]
        ctx.weight, ctx.queue = weight, options.queue
        all_right = all_right.view(*wanted.shape[:2], -1)
        ctx.mark_non_differentiable(sums, all_right)
        return total, sums, all_right

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
        return weight, None, None, None, *states


def _chunk(
    hidden: Tensor, weight: Tensor, target: Tensor, weights: Tensor | None, share: _Share
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [n, d], weight [v, d] (``_Share.rows``), target [n] -> (cross-entropy float32 [n], top-1 right bool [n], d(weighted
    loss)/d(logits) [n, v] or None)."""
    logits = share.hide((hidden @ weight.T).float())
    group, rows = share.group, logits.shape[1]
    local = target - share.first
    here = (local >= 0) & (local < rows)
    local = local.clamp(0, rows - 1).unsqueeze(1)
    top, best = _largest(logits.max(dim=1), share)
    wanted_logit = torch.where(here, logits.gather(1, local).squeeze(1) - top, 0.0)
    exponential = logits.sub_(top.unsqueeze(1)).exp_()
    sums = group.all_reduce(torch.stack((exponential.sum(1), wanted_logit)))
    loss = sums[0].log() - sums[1]
    if weights is None:
        return loss, best == target, None
    slope = exponential.mul_((weights / sums[0]).unsqueeze(1))
    slope.scatter_add_(1, local, torch.where(here, -weights, 0.0).unsqueeze(1))
    return loss, best == target, slope.to(hidden.dtype)


def _order_chunk(
    hidden: Tensor, weight: Tensor, target: Tensor, part: Tensor, weights: Tensor | None, share: _Share
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``_chunk``, with several targets [n, W] and the part of each [n, W]. Right: the likeliest token is the first target."""
    logits = (hidden @ weight.T).float()
    rows, local = logits.shape[1], target - share.first
    here = (local >= 0) & (local < rows)
    local = local.clamp(0, rows - 1)
    top, best = _largest(logits.max(dim=1), share)
    logits.sub_(top.unsqueeze(1))
    expected = (torch.where(here, logits.gather(1, local), 0.0) * part).sum(1)
    exponential = logits.exp_()
    sums = share.group.all_reduce(torch.stack((exponential.sum(1), expected)))
    loss = sums[0].log() - sums[1]
    if weights is None:
        return loss, best == target[:, 0], None
    slope = exponential.mul_((weights / sums[0]).unsqueeze(1))
    slope.scatter_add_(1, local, torch.where(here, -part * weights.unsqueeze(1), 0.0))
    return loss, best == target[:, 0], slope.to(hidden.dtype)


def _soft_chunk(
    hidden: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, weights: Tensor | None, share: _Share
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``_chunk``, with softmax(teacher taught) for targets: taught [n, d], teacher [V/R, d]. Right: both have the same
    likeliest token, of all that the teacher knows."""
    logits, target = share.hide((hidden @ weight.T).float()), (taught @ teacher.T).float()
    # Both at once: a collective for each would be as long.
    both = [torch.stack(pair) for pair in zip(logits.max(dim=1), target.max(dim=1), strict=True)]
    top, best = _largest(both, share)
    logits.sub_(top[0].unsqueeze(1))
    target.sub_(top[1].unsqueeze(1)).exp_()
    every = target.sum(1)
    if share.kept is not None:
        target = target[:, : logits.shape[1]] * (share.kept > share.first)
    expected = torch.linalg.vecdot(target, logits)
    exponential = logits.exp_()
    sums = share.group.all_reduce(torch.stack((exponential.sum(1), every, expected, target.sum(1))))
    mass = sums[3] / sums[1] if share.kept is not None else torch.ones_like(sums[0])
    loss = mass * sums[0].log() - sums[2] / sums[1]
    if weights is None:
        return loss, best[0] == best[1], None
    slope = exponential.mul_((mass * weights / sums[0]).unsqueeze(1)).sub_(target.mul_((weights / sums[1]).unsqueeze(1)))
    return loss, best[0] == best[1], slope.to(hidden.dtype)


def _largest(own: Sequence[Tensor], share: _Share) -> tuple[Tensor, Tensor]:
    """Largest logits of this rank's rows and their places -> those of the whole vocabulary."""
    top, best = own
    if share.group.size > 1:
        own_top = top.clone()
        share.group.all_reduce(top, dist.ReduceOp.MAX)
        # The smallest index among the ranks that hold the maximum, as argmax over the whole row would find.
        best = torch.where(own_top == top, best + share.first, torch.iinfo(torch.int64).max)
        share.group.all_reduce(best, dist.ReduceOp.MIN)
    return top, best
