"""Which token each head predicts at each position, and whether that target counts."""

import torch
from torch import Tensor

IGNORE = -1


def targets(
    tokens: Tensor, documents: Tensor, depth: int, *, stride: int = 1, inside: bool = False, ahead: int | None = None
) -> Tensor:
    """tokens, documents int [B, S+1+ahead], with the stride s ahead = D s unless it is given -> int64 [B, S, 1+D]: entry (i, k)
    is t[i+1+k s], or IGNORE where tokens i .. i+1+k s do not lie in one document (documents are contiguous, so their ends tell)
    or the row is padding (document -1).

    inside: also where i + k is beyond the S positions, so that the trunk has no state there to learn from."""
    positions = tokens.shape[1] - 1 - (depth * stride if ahead is None else ahead)
    here = documents[:, :positions]
    columns = []
    for k in range(depth + 1):
        there = slice(1 + k * stride, 1 + k * stride + positions)
        columns.append(torch.where((here == documents[:, there]) & (here >= 0), tokens[:, there], IGNORE))
        if inside:
            columns[-1][:, max(0, positions - k) :] = IGNORE
    return torch.stack(columns, dim=-1)


def upcoming(tokens: Tensor, documents: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """tokens, documents int [B, S+W] -> (int64 [B, S, W]: entry (i, j) is t[i+1+j]; float32 [B, S, W]: its share as a target of
    ``model/mtp/order.py``, e^-j over the sum of those that count). Those count that are in i's document and come for the first
    time; where none does, all shares are 0."""
    positions = tokens.shape[1] - window
    ahead, owners = tokens[:, 1:].unfold(1, window, 1), documents[:, 1:].unfold(1, window, 1)
    here = documents[:, :positions].unsqueeze(-1)
    counts = (owners == here) & (here >= 0)
    for j in range(1, window):
        counts[..., j] &= (ahead[..., :j] != ahead[..., j : j + 1]).all(-1)
    shares = counts * torch.exp(-torch.arange(window, device=tokens.device, dtype=torch.float32))
    return ahead, shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)


def valid_counts(wanted: Tensor) -> Tensor:
    """``targets`` [B, S, 1+D] -> int64 [1+D]: how many count at each depth."""
    return (wanted != IGNORE).sum((0, 1))
