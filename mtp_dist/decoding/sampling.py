"""From logits to the next token: temperature, top-k and top-p as one pure function, and a seeded draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.config.schema import DecodeConfig


@dataclass(frozen=True)
class Sampling:
    """How a distribution is made of logits. Temperature 0 is greedy decoding and has no distribution. typical: epsilon and delta
    of the lossy rule ``verify_typical``; None: drafts are verified without loss."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical: tuple[float, float] | None = None

    @staticmethod
    def of(config: DecodeConfig) -> "Sampling":
        typical = (config.typical_epsilon, config.typical_delta) if config.verify == "typical" else None
        return Sampling(config.temperature, config.top_k, config.top_p, typical)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [.., V] -> probabilities [.., V] of the same dtype; see the function of this name."""
        return probabilities(logits, self.temperature, self.top_k, self.top_p)


def probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the last dimension, cut and scaled to sum 1 again.

    First the `top_k` likeliest tokens are kept (0: all), then of those the fewest likeliest that hold at least the probability
    `top_p` (nucleus sampling, arXiv 1904.09751; always one or more). Of equally likely tokens the lower number goes first.
    """
    # The largest logit becomes 0 first: a tiny temperature must not overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
        if 0 < top_k < logits.shape[-1]:
            logits[..., top_k:] = float("-inf")
        ranked = logits.softmax(-1)
        if top_p < 1:
            before = ranked.cumsum(-1) - ranked
            # The first token survives any rounding.
            ranked[..., 1:][before[..., 1:] >= top_p] = 0
            ranked /= ranked.sum(-1, keepdim=True)
        return torch.zeros_like(ranked).scatter_(-1, order, ranked)
    return logits.softmax(-1)


class Chance:
    """One generator for each row of a batch (None: torch's own), so that a row's text does not depend on the other rows."""

    def __init__(self, generators: Sequence[torch.Generator | None]) -> None:
        self.generators = list(generators)

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on, in this order."""
        self.generators = [self.generators[row] for row in rows]

    def join(self, other: "Chance") -> None:
        """The rows of another one go on behind these."""
        self.generators = self.generators + other.generators


Source = Chance | torch.Generator | None
"""Where chance comes from: by row, or one generator (None: torch's own) for the whole batch."""


def draw(distribution: Tensor, source: Source) -> Tensor:
    """One token int64 [..] for each distribution [.., V]; weights need not sum to 1."""
    if isinstance(source, Chance):
        return torch.stack([draw(row, generator) for row, generator in zip(distribution, source.generators, strict=True)])
    flat = distribution.reshape(-1, distribution.shape[-1])
    return torch.multinomial(flat, 1, generator=source).view(distribution.shape[:-1])


def uniform(like: Tensor, source: Source, counts: Tensor | None = None) -> Tensor:
    """Numbers from [0, 1) in the shape and dtype of ``like`` [B, ..]. counts int64 [B]: where a row needs fewer than its [n], no
    more are drawn; the others are 0."""
    if isinstance(source, Chance):
        if counts is None:
            return torch.stack([uniform(row, generator) for row, generator in zip(like, source.generators, strict=True)])
        found = torch.zeros_like(like)
        for row, count, generator in zip(found, counts.tolist(), source.generators, strict=True):
            row[:count] = uniform(row[:count], generator)
        return found
    return torch.rand(like.shape, generator=source, dtype=like.dtype, device=like.device)
