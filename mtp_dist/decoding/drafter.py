"""Drafters: where the tokens come from that the trunk verifies.

One interface. A drafter may be wrong without harm: ``verification`` decides, so a bad draft costs time, never text.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Sampling, Source, draw
from mtp_dist.decoding.text import Texts
from mtp_dist.decoding.tree import Tree


@dataclass(frozen=True)
class Proposal:
    """tokens int64 [B, γ]: drafts of the tokens after the known ones. probabilities [B, γ, V]: the distributions they were drawn
    from; None if chance had no part in it (then each draft is the whole distribution). counts: drafts of each row, where some
    have fewer than γ (what stands behind them means nothing); None: γ each."""

    tokens: Tensor
    probabilities: Tensor | None
    counts: list[int] | None = None


class Drafter(Protocol):
    """Drafts tokens of one batch of texts, from the first to the last."""

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        """The prompts, with the trunk's states of all their positions. Called once, first."""
        ...

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        """The texts have grown: the trunk's states of the positions that were not shown yet, up to the last but one known token
        (its newest has not been run); what follows them in a row means nothing. Called after every pass."""
        ...

    def propose(self, texts: Texts, count: int) -> Proposal | Tree:
        """``count`` >= 1 drafts, or a tree of that depth, also written behind the known tokens. Earlier drafts not found in the
        texts were rejected."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on, in this order."""
        ...

    def join(self, other: Self) -> None:
        """The rows of another drafter of the same kind for the same model go on behind these. Called between rounds: both have
        seen all of their texts, and no drafts are open."""
        ...


class Chooser:
    """From a drafter's logits to drafts: the likeliest tokens, or drawn as the text itself is."""

    def __init__(self, model: DecodingModel, sampling: Sampling, source: Source) -> None:
        self.model, self.sampling, self.source = model, sampling, source

    def choose(self, states: Tensor, matrix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """states [B, d] ready for the head (matrix: its own one) -> (drafts [B], their distributions [B, V]; greedy: None)."""
        token, distribution = pick(self.model.logits(states, matrix), self.sampling, self.source)
        return self.model.same(token), distribution

    def choose_drafted(self, states: Tensor, matrix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As ``choose``, among the model's ``drafted`` tokens: a distribution is 0 for all others."""
        tokens = self.model.drafted
        if tokens is None:
            return self.choose(states, matrix)
        place, distribution = pick(self.model.draft_logits(states), self.sampling, self.source)
        if distribution is not None:
            distribution = spread(distribution, tokens, self.model.vocabulary, 0.0)
        return self.model.same(tokens[place]), distribution


def spread(values: Tensor, tokens: Tensor, vocabulary: int, rest: float) -> Tensor:
    """values [.., n] of these tokens [n] -> [.., V], `rest` for all others."""
    return values.new_full((*values.shape[:-1], vocabulary), rest).index_copy_(-1, tokens, values)


def pick(logits: Tensor, sampling: Sampling, source: Source) -> tuple[Tensor, Tensor | None]:
    """logits [B, V] -> (drafts [B], their distributions [B, V]; greedy: None)."""
    if sampling.greedy:
        return logits.argmax(-1), None
    distribution = sampling.probabilities(logits)
    return draw(distribution, source), distribution


def proposal(texts: Texts, distributions: list[Tensor | None]) -> Proposal:
    """The drafts written behind the texts, one for each distribution [B, V]."""
    drawn = [distribution for distribution in distributions if distribution is not None]
    return Proposal(texts.drafts(len(distributions)), torch.stack(drawn, dim=1) if drawn else None)
