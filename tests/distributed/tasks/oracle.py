"""The one-process reference: a whole model, without any of the parallel code."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mtp_dist.config.heads import learns_inside, lookahead
from mtp_dist.config.layout import tokens_per_step
from mtp_dist.config.schema import TrainingRun
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize
from mtp_dist.model.targets import targets, valid_counts
from mtp_dist.training.objective import coefficients, draws, target_scale
from mtp_dist.training.own_tokens import Draws, own_tokens
from mtp_dist.training.statistics import Totals
from tests.distributed.layouts import configuration, draft_tokens, global_batch

STEPS = 3
HEADS = ("mtp.", "adversary.")
SPLITS = 4
"""Micro-batches of the reference in bfloat16."""


def reference(layout: str | dict[str, Any]) -> dict[str, Any]:
    """The same three steps by plain autograd on one whole model, torch's own AdamW and clipping.

    float32: the whole global batch at once. bfloat16: the same of weights that are rounded from float32 masters before each step,
    with gradients of single micro-batches added up in float32: what mixed precision means, without any of the parallel code.
    """
    config = configuration(layout)
    dtype = getattr(torch, config.train.dtype)
    masters, model = _whole_model(config), _whole_model(config).to(dtype)
    learning = {name: p for name, p in masters.named_parameters() if name.startswith(HEADS) or not config.mtp.freeze_trunk}
    for name, p in model.named_parameters():
        # What needs no gradient may round elsewhere: on a CPU bfloat16 attention is computed in float32 where one is needed.
        p.requires_grad_(name in learning)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": config.optim.weight_decay if p.ndim >= 2 else 0.0,
                "lr": config.optim.lr * (config.optim.head_lr_ratio if name.startswith(HEADS) else 1.0),
            }
            for name, p in learning.items()
        ],
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
    )
    initial = {name: p.detach().clone() for name, p in masters.named_parameters()}
    splits = 1 if dtype == torch.float32 else SPLITS
    losses, means, norms, gradients = [], [], [], {}
    held_out = _reference_result(model, config, 77, [0.0] * (1 + config.mtp.depth), 1)[1].means()
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = coefficients(config.mtp, step * tokens_per_step(config))
        drawn = draws(config, step, step * tokens_per_step(config))
        loss, totals = _reference_result(model, config, step, parts, splits, learning, drawn)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}
        norms.append(nn.utils.clip_grad_norm_(learning.values(), config.optim.clip).item())
        optimizer.step()
        model.load_state_dict(masters.state_dict())
        losses.append(loss)
        means.append(totals.means())
    return {
        "losses": losses,
        "means": means,
        "norms": norms,
        "gradients": gradients,
        "held_out": held_out,
        "initial": initial,
        "weights": {name: p.detach() for name, p in masters.named_parameters()},
    }


def _whole_model(config: TrainingRun) -> Chunk:
    with torch.device("meta"):
        model = Chunk(config.model, config.mtp, range(config.model.layers), draft_tokens=draft_tokens(config))
    initialize(model, config.seed)
    return model


def _reference_result(
    model: Chunk,
    config: TrainingRun,
    step: int,
    parts: list[float],
    splits: int,
    learning: Mapping[str, nn.Parameter] = MappingProxyType({}),
    drawn: Draws | None = None,
) -> tuple[float, Totals]:
    """The loss and the statistics of a global batch; its gradients are added to those of the parameters that are `learning`.
    drawn: of the model's own predictions.

    Depths beyond the `parts` are computed like the others, with a weight of 0."""
    batch = global_batch(config, step)
    mtp = config.mtp
    options = {"stride": mtp.stride, "inside": learns_inside(mtp), "ahead": lookahead(mtp)}
    counts = valid_counts(targets(batch.tokens, batch.documents, mtp.depth, **options))
    scale = target_scale(parts, counts, replicas=1).expand(len(batch), -1)
    out = torch.zeros(model.result_size())
    rows = {"tokens": batch.tokens, "documents": batch.documents, "scale": scale}
    if drawn is not None and drawn.probability:
        rows["own"] = own_tokens(drawn, range(len(batch)), config.train.sequence_length, mtp.depth)
    for parts_of_rows in zip(*(each.chunk(splits) for each in rows.values()), strict=True):
        result = model(**dict(zip(rows, parts_of_rows, strict=True)))
        out += result.detach()
        if not learning:
            continue
        model.zero_grad()
        result[0].backward()
        for name, master in learning.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                master.grad = gradient.float() if master.grad is None else master.grad + gradient
    sums = out[1:].view(len(counts), -1).double()
    sums[len(parts) :], counts[len(parts) :] = 0, 0
    return out[0].item(), Totals(out[0].item(), sums, counts)
