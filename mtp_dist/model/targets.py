"""Which token each head predicts at each position, and whether that target counts."""

import torch
from torch import Tensor

IGNORE = -1


def targets(tokens: Tensor, documents: Tensor, depth: int, *, stride: int = 1, inside: bool = False) -> Tensor:
    """tokens, documents int [B, S+1+D s] with the stride s -> int64 [B, S, 1+D]: entry (i, k) is t[i+1+k s], or IGNORE where
    tokens i .. i+1+k s do not lie in one document (documents are contiguous, so their ends tell) or the row is padding
    (document -1).

    inside: also where i + k is beyond the S positions, so that the trunk has no state there to learn from."""
    positions = tokens.shape[1] - 1 - depth * stride
    here = documents[:, :positions]
    columns = []
    for k in range(depth + 1):
        there = slice(1 + k * stride, 1 + k * stride + positions)
        columns.append(torch.where((here == documents[:, there]) & (here >= 0), tokens[:, there], IGNORE))
        if inside:
            columns[-1][:, max(0, positions - k) :] = IGNORE
    return torch.stack(columns, dim=-1)


def valid_counts(wanted: Tensor) -> Tensor:
    """``targets`` [B, S, 1+D] -> int64 [1+D]: how many count at each depth."""
    return (wanted != IGNORE).sum((0, 1))
