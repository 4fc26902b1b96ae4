"""Which token each head predicts at each position, and whether that target counts."""

import torch
from torch import Tensor

IGNORE = -1


def targets(tokens: Tensor, documents: Tensor, depth: int, *, inside: bool = False) -> Tensor:
    """tokens, documents int [B, S+1+D] -> int64 [B, S, 1+D]: entry (i, k) is t[i+k+1], or IGNORE where tokens i .. i+k+1 do not
    lie in one document (documents are contiguous, so their ends tell) or the row is padding (document -1).

    inside: also where i + k is beyond the S positions, so that the trunk has no state there to learn from."""
    positions = tokens.shape[1] - 1 - depth
    here = documents[:, :positions]
    columns = []
    for k in range(depth + 1):
        there = slice(k + 1, k + 1 + positions)
        columns.append(torch.where((here == documents[:, there]) & (here >= 0), tokens[:, there], IGNORE))
        if inside:
            columns[-1][:, max(0, positions - k) :] = IGNORE
    return torch.stack(columns, dim=-1)


def valid_counts(wanted: Tensor) -> Tensor:
    """``targets`` [B, S, 1+D] -> int64 [1+D]: how many count at each depth."""
    return (wanted != IGNORE).sum((0, 1))
