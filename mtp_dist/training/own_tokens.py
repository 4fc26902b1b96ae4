"""Where a step feeds the depths the model's own predictions instead of true tokens (scheduled sampling, arXiv 1506.03099).

Each depth at each position of each row decides for itself. A decision is a pure function of (seed, step, row of the global batch,
depth, position), so it is the same under every layout, split into micro-batches and on every tensor rank, when activations are
computed again, and after a resume.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """`step`: optimizer steps tried before this one; `probability`: that of an own prediction."""

    seed: int
    step: int
    probability: float


def own_tokens(draws: Draws, rows: range, positions: int, depth: int) -> Tensor:
    """bool [rows, S, D], `rows` being rows of the global batch: entry (r, i, k-1) says that depth k at position i of row r is fed
    what depth k-1 (for k = 1 the main head) predicts there."""
    drawn = torch.stack([_uniform(draws, row, positions, depth) for row in rows])
    return (drawn < draws.probability).transpose(1, 2)


def _uniform(draws: Draws, row: int, positions: int, depth: int) -> Tensor:
    """float32 [D, S] in [0, 1)."""
    digest = hashlib.sha256(f"{draws.seed}/own tokens/{draws.step}/{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(depth, positions, generator=generator)
