"""What the optimizer trains, as one ordered list of groups: trunk with decay, trunk without, heads with decay, heads without.

Heads are the parameters named ``mtp.*`` and ``adversary.*``. Every rank of a pipeline lists the same groups in the same order,
even those of which it holds nothing: ZeRO's gradient norm is one collective a group, so a group that is missing on one rank
stops them all. An empty group is held open by a placeholder, one zero that no module uses, no checkpoint holds and no norm
counts.
"""

from typing import Any

import torch
from torch import nn

from mtp_dist.config.schema import OptimConfig
from mtp_dist.model.parameter import spec_of

TRUNK, HEADS = "trunk", "heads"


def role_of(name: str) -> str:
    """``HEADS`` for a parameter of the MTP modules or of their adversary, else ``TRUNK`` (embedding and output head belong to
    it)."""
    return HEADS if name.startswith(("mtp.", "adversary.")) else TRUNK


def freeze_trunk(chunks: nn.ModuleList) -> None:
    """From now on only the MTP modules learn."""
    for chunk in chunks:
        for name, p in chunk.named_parameters():
            p.requires_grad_(role_of(name) == HEADS)


def ordered_groups(
    trained: dict[str, nn.Parameter], optim: OptimConfig, dtype: torch.dtype, device: torch.device, *, hold_open: bool
) -> tuple[list[dict[str, Any]], nn.ParameterList]:
    """The groups of the parameters that this rank trains (by global name), as torch's optimizers take them, with their `role` and
    `lr_ratio`; and the placeholders. Without `hold_open` empty groups are left out.

    Matrices decay, vectors (norms) do not.
    """
    groups: list[dict[str, Any]] = []
    placeholders = nn.ParameterList()
    for role, ratio in ((TRUNK, 1.0), (HEADS, optim.head_lr_ratio)):
        for matrices, decay in ((True, optim.weight_decay), (False, 0.0)):
            members = [p for name, p in trained.items() if role_of(name) == role and (len(spec_of(p).shape) >= 2) == matrices]
            if not members and hold_open:
                placeholders.append(nn.Parameter(torch.zeros(1, dtype=dtype, device=device)))
                members = [placeholders[-1]]
            if members:
                groups.append({"params": members, "weight_decay": decay, "role": role, "lr_ratio": ratio})
    return groups, placeholders
