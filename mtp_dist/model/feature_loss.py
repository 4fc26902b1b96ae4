"""How far the states that a head draws are from the trunk's own: the loss that EAGLE (arXiv 2401.15077, section 4.2) adds.

A distance is the mean of SmoothL1 over the d elements of a state: e²/2 where |e| < 1, else |e| - 1/2. Under sequence parallelism
a rank has the gradient of its positions alone; the values are sums over all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.model.targets import IGNORE
from mtp_dist.model.tensor_group import TensorGroup


def feature_loss(
    drawn: list[Tensor], trunk: Tensor, wanted: Tensor, scale: Tensor, group: TensorGroup
) -> tuple[Tensor, Tensor]:
    """drawn: D states [B, s, d], depth k at position i for the trunk's state at i + k; trunk [B, s, d], which gets no gradient
    (s: S, or this rank's share of the positions); wanted: ``targets`` [B, S, 1+D], whose valid ones have i + k < S; scale
    [B, 1+D].

    Returns (float32 scalar: sum over valid targets of scale[b, k] * distance, float32 [D]: sums of distances).
    """
    trunk = group.whole_positions(trunk.detach())
    own = group.own_positions(trunk.shape[1])
    sums, weighted = [], []
    for k, state in enumerate(drawn, start=1):
        # Behind the row's end nothing is valid.
        ahead = F.pad(trunk[:, k:], (0, 0, 0, k))[:, own]
        wide = torch.promote_types(state.dtype, torch.float32)
        distance = F.smooth_l1_loss(state.to(wide), ahead.to(wide), reduction="none").mean(-1)
        distance = torch.where(wanted[:, own, k] != IGNORE, distance, 0.0)
        sums.append(distance.detach().sum())
        weighted.append((distance.sum(1) * scale[:, k]).sum())
    loss = torch.stack(weighted).sum().float()
    values = torch.cat((torch.stack(sums).float(), loss.detach().view(1)))
    if group.shares_positions:
        group.all_reduce(values)
        loss = loss + (values[-1] - loss.detach())
    return loss, values[:-1]
