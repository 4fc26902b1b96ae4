"""The output head and its cross-entropy over all depths: chunked, vocabulary-parallel, gradient computed in the forward pass.

Logits are never whole: the shared head runs over chunks of positions, one depth at a time, and each chunk's gradient is formed
while its logits exist. One float32 buffer of the head's own shape holds its gradient for the main head and all depths, so head
memory does not grow with D. Under tensor parallelism every rank holds a slice of the vocabulary and sees the same states, which
have been through ``TensorGroup.enter``: what comes back for them is this slice's share of the gradient.

A target is a token, or with a ``Teacher`` the whole distribution that the trunk's main head gives k positions further on
(self-distillation): what a draft of depth k will be held against. Its logits, too, exist a chunk at a time.

The depths may know a part of the vocabulary only, the tokens `kept`: their softmax is over those. Another target has no loss, be
it a token or what a teacher gives to others, and is not right; but it stays among those that means are taken of, so an accuracy
is still that of a decoder. (EAGLE-3's code leaves a target out whole where the teacher's likeliest token is another: a near tie
then decides about a term of the loss.) Tensor ranks may have unequal shares of the work: as many rows as of these tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_dist.model.draft_tokens import DraftTokens
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
    kept: DraftTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """states: 1+D tensors [B, S, d]; weight [V/R, d] (where R > 1: of ``parameter``); wanted: ``targets`` [B, S, 1+D]; scale
    float32 [B, 1+D].
    main_only: of the losses only the first, the main head's, gives the weight a gradient; the states get all of theirs.
    teacher: then `wanted` only says which targets count, and must leave out (`inside`) those beyond the last position.
    kept: the tokens that the depths >= 1 know; None: all.

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
    kept: DraftTokens | None = None,
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
    options = _Options(share, share if kept is None else share.among(kept), queue, learn, main_only, teacher, order, first)
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


@torch.no_grad()
def likeliest(state: Tensor, weight: nn.Parameter, group: TensorGroup) -> Tensor:
    """state [B, S, d], the same on each tensor rank; weight [V/R, d] -> int64 [B, S]: the token of the largest logit, of equal
    ones the smallest. The same on each tensor rank; logits exist a chunk at a time. No gradient."""
    share, hidden = _Share.of(weight, group), state.flatten(0, 1)
    found = []
    for part in hidden.split(max(1, LOGITS_IN_FLIGHT // share.most)):
        top, column = (part @ weight.T).float().max(dim=1)
        found.append(_largest(top, share.tokens(column), group)[1])
    return torch.cat(found).view(state.shape[:2])


@dataclass(frozen=True)
class _Share:
    """This rank's rows of the vocabulary: from `first` on. `most`: rows that no rank exceeds; ranks must cut positions alike.
    `kept`: tokens that count, None for all. Columns of logits are those of ``rows``."""

    group: TensorGroup
    first: int
    most: int
    kept: DraftTokens | None = None

    @staticmethod
    def of(weight: nn.Parameter, group: TensorGroup) -> "_Share":
        if group.size == 1:
            return _Share(group, 0, weight.shape[0])
        spec = spec_of(weight)
        return _Share(group, spec.start[0], spec.largest_share)

    def among(self, kept: DraftTokens) -> "_Share":
        return replace(self, most=min(self.most, len(kept)), kept=kept)

    def rows(self, weight: Tensor) -> Tensor:
        """Those of the matrix [V/R, d] that count, a copy where not all do; one at least, which ``hide`` takes back."""
        return weight if self.kept is None else weight[self.kept.rows]

    def hide(self, logits: Tensor) -> Tensor:
        """A rank without a row that counts says something impossible, yet finite: 0 times it must be 0."""
        return logits.fill_(-1e30) if self.kept is not None and self.kept.empty else logits

    def known(self, target: Tensor) -> Tensor:
        """Which targets (no ``IGNORE``; those mean nothing) are tokens that count, on any rank."""
        return torch.ones_like(target, dtype=torch.bool) if self.kept is None else self.kept.known[target.clamp(min=0)]

    def columns(self, target: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Which targets have one of this rank's `width` columns, and which; a column that exists for the others."""
        local = target - self.first
        if self.kept is not None:
            size = len(self.kept.places)
            places = self.kept.places[local.clamp(0, size - 1)]
            local = torch.where((local >= 0) & (local < size), places, -1)
        return (local >= 0) & (local < width), local.clamp(0, width - 1)

    def tokens(self, columns: Tensor) -> Tensor:
        """The tokens of this rank's columns."""
        return self.first + (columns if self.kept is None else self.kept.rows[columns])


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
        drafted, picked, kept = options.drafts.rows(weight), None, options.drafts.kept
        if kept is not None and learn_weight and not options.main_only:
            # Their gradients go back to their rows once, not a chunk at a time.
            picked = torch.zeros(drafted.shape, dtype=torch.float32, device=weight.device)
        for column, state in enumerate(states):
            k = options.first + column
            share = options.drafts if k > 0 else options.share
            matrix = drafted if k > 0 else weight
            taught = teacher.state.reshape(rows, width) if teacher is not None and k > 0 else None
            # A teacher's logits are in flight beside the head's own.
            step = max(1, LOGITS_IN_FLIGHT // (share.most if taught is None else share.most + options.share.most))
            teaches_weight = learn_weight and not (options.main_only and k > 0)
            hidden, target = state.reshape(rows, width), wanted[..., column].flatten()
            for begin in range(0, rows, step):
                part = slice(begin, min(rows, begin + step))
                valid = target[part] != IGNORE
                known = valid if taught is not None else valid & share.known(target[part])
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
                    tutor = (taught[ahead], teacher.weight, options.share)
                    loss, right, slope = _soft_chunk(hidden[part], matrix, *tutor, asked, share)
                loss = torch.where(known, loss, 0.0)
                all_right[part, column] = right & valid
                total += (loss * weights).sum()
                sums[column] += loss.sum()
                if slope is None:
                    continue
                if learn_states[column]:
                    torch.mm(slope, matrix, out=ctx.state_gradients[column].view(rows, width)[part])
                if teaches_weight:
                    gradient = picked if k > 0 and picked is not None else ctx.weight_gradient
                    gradient += slope.T @ hidden[part]
        if picked is not None and kept is not None:
            ctx.weight_gradient.index_add_(0, kept.rows, picked)
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
    here, local = share.columns(target, rows)
    local = local.unsqueeze(1)
    top, column = logits.max(dim=1)
    top, best = _largest(top, share.tokens(column), share.group)
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
    here, local = share.columns(target, logits.shape[1])
    top, column = logits.max(dim=1)
    top, best = _largest(top, share.tokens(column), share.group)
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
    hidden: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, whole: _Share, weights: Tensor | None, share: _Share
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``_chunk``, with softmax(teacher taught) for targets: taught [n, d], teacher [V/R, d] (`whole`). Right: both have the
    same likeliest token, of all that the teacher knows."""
    logits, target = share.hide((hidden @ weight.T).float()), (taught @ teacher.T).float()
    # Both at once: a collective for each would be as long.
    (own_top, own_best), (taught_top, taught_best) = logits.max(dim=1), target.max(dim=1)
    tokens = torch.stack((share.tokens(own_best), whole.tokens(taught_best)))
    top, best = _largest(torch.stack((own_top, taught_top)), tokens, share.group)
    logits.sub_(top[0].unsqueeze(1))
    target.sub_(top[1].unsqueeze(1)).exp_()
    every = target.sum(1)
    if share.kept is not None:
        target = target[:, share.kept.rows] * (not share.kept.empty)
    expected = torch.linalg.vecdot(target, logits)
    exponential = logits.exp_()
    sums = share.group.all_reduce(torch.stack((exponential.sum(1), every, expected, target.sum(1))))
    mass = sums[3] / sums[1] if share.kept is not None else torch.ones_like(sums[0])
    loss = mass * sums[0].log() - sums[2] / sums[1]
    if weights is None:
        return loss, best[0] == best[1], None
    slope = exponential.mul_((mass * weights / sums[0]).unsqueeze(1)).sub_(target.mul_((weights / sums[1]).unsqueeze(1)))
    return loss, best[0] == best[1], slope.to(hidden.dtype)


def _largest(top: Tensor, best: Tensor, group: TensorGroup) -> tuple[Tensor, Tensor]:
    """Largest logits of this rank's columns and their tokens -> those of all ranks."""
    if group.size > 1:
        own_top = top.clone()
        group.all_reduce(top, dist.ReduceOp.MAX)
        # The smallest token among the ranks that hold the maximum, as argmax over the whole row would find.
        best = torch.where(own_top == top, best, torch.iinfo(torch.int64).max)
        group.all_reduce(best, dist.ReduceOp.MIN)
    return top, best
