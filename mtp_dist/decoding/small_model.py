"""Drafts by another, smaller model with the same tokenizer (arXiv 2211.17192, 2302.01318): its trunk, one token a pass."""

from typing import Self

from mtp_dist.decoding.drafter import Chooser, Proposal, proposal
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Sampling, Source
from mtp_dist.decoding.text import Snapshot, Texts


class ModelDrafter:
    """An independent model. Each row of its caches is cropped to the tokens that turned out right."""

    def __init__(self, model: DecodingModel, batch: int, sampling: Sampling, source: Source) -> None:
        self.model, self.caches = model, model.caches(batch)
        self.chooser = Chooser(model, sampling, source)
        self.used: Snapshot | None = None

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self.model.trunk(texts.tokens, self.caches, texts.known)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        if self.used is not None:
            # The newest token is run again, should it be there: a draft is made of its states.
            right = [min(same, known - 1) for same, known in zip(self.used.right(texts), texts.known, strict=True)]
            for cache in self.caches:
                cache.crop(right)
            self.used = None

    def propose(self, texts: Texts, count: int) -> Proposal:
        distributions = []
        for place in range(count):
            ends = [known + place for known in texts.known]
            span = self.model.span(self.caches[0].lengths, ends)
            states = self.model.trunk(texts.tokens, self.caches, ends).after_norm
            token, distribution = self.chooser.choose(span.last(states))
            texts.draft(place, token)
            distributions.append(distribution)
        self.used = Snapshot(texts, count)
        return proposal(texts, distributions)

    def keep(self, rows: list[int]) -> None:
        for cache in self.caches:
            cache.keep(rows)
        if self.used is not None:
            self.used.keep(rows)

    def join(self, other: Self) -> None:
        assert self.used is None
        assert other.used is None
        for own, new in zip(self.caches, other.caches, strict=True):
            own.join(new)
