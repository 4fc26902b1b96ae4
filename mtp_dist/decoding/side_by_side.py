"""Drafts by heads whose depths stand side by side on one state of the trunk (parallel, Medusa), or that have no attention."""

from typing import Self

import torch
from torch import Tensor

from mtp_dist.decoding.drafter import Chooser, Proposal, proposal
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Sampling, Source
from mtp_dist.decoding.text import Texts
from mtp_dist.model.mtp.medusa import MedusaHeads, MedusaModule
from mtp_dist.model.mtp.notebook import NotebookHeads
from mtp_dist.model.mtp.parallel import ParallelHeads, ParallelModule


class ParallelDrafter:
    """With t[0 .. n] known, each module of ``ParallelHeads`` runs at position n-1 and drafts t[n+k], blind to the drafts between.
    Its cache is made from the trunk's states alone, so it never has to be rolled back."""

    def __init__(
        self, model: DecodingModel, heads: ParallelHeads, batch: int, sampling: Sampling, source: Source, *, most: int
    ) -> None:
        """``most``: the largest count that will be asked for, D at most."""
        self.model, self.taps = model, heads.taps
        self.chooser = Chooser(model, sampling, source)
        self.modules = [heads[str(k)] for k in range(1, most + 1)]
        self.caches = [model.cache(batch, module) for module in self.modules]
        self.input = model.hidden_states(batch)
        self.positions = [0] * batch

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self._show(trunk, list(texts.known))
        # The last position waits: its states are what the first draft is made of.
        ends = [positions - 1 for positions in self.positions]
        if max(ends) > 0:
            for depth in range(1, len(self.modules) + 1):
                self._run(depth, texts.tokens, ends)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        self._show(trunk, [known - 1 for known in texts.known])

    def propose(self, texts: Texts, count: int) -> Proposal:
        distributions = []
        for depth in range(1, count + 1):
            token, distribution = self.chooser.choose(self._run(depth, texts.tokens, self.positions))
            texts.draft(depth - 1, token)
            distributions.append(distribution)
        return proposal(texts, distributions)

    def keep(self, rows: list[int]) -> None:
        self.input.keep(rows)
        for cache in self.caches:
            cache.keep(rows)
        self.positions = [self.positions[row] for row in rows]

    def join(self, other: Self) -> None:
        self.input.join(other.input)
        for own, new in zip(self.caches, other.caches, strict=True):
            own.join(new)
        self.positions = self.positions + other.positions

    def _show(self, trunk: TrunkPass, ends: list[int]) -> None:
        states = trunk.taps[self.taps[0]] if self.taps else trunk.before_norm
        self.input.write(self.model.span(self.positions, ends), states)
        self.positions = ends

    def _run(self, depth: int, tokens: Tensor, ends: list[int]) -> Tensor:
        """Module ``depth`` over the positions from the ends of its cache to ends[b] - 1; its state [B, d] of the last."""
        cache, module, norm = self.caches[depth - 1], self.modules[depth - 1], self.model.chunk.norm
        assert isinstance(module, ParallelModule)
        assert norm is not None
        span = self.model.span(cache.lengths, ends)
        mask = self.model.visible(tokens, span)
        states = module.block(self.input.read(span), self.model.turned(span), mask, cache.at(span))
        ready: Tensor = norm(span.last(states))
        return ready


class PointDrafter:
    """Heads that look at position n-1 alone: Medusa's, side by side; the notebook's, in a chain whose last module is recycled."""

    def __init__(self, model: DecodingModel, heads: MedusaHeads | NotebookHeads, sampling: Sampling, source: Source) -> None:
        self.model, self.heads = model, heads
        self.chooser = Chooser(model, sampling, source)
        self.normed = heads.first_normed if isinstance(heads, NotebookHeads) else True
        self.positions: list[int] = []
        self.state: Tensor | None = None  # [B, d], the trunk's at the newest position it has run

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self.positions = [0] * len(texts)
        self._show(trunk, list(texts.known))

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        self._show(trunk, [known - 1 for known in texts.known])

    def propose(self, texts: Texts, count: int) -> Proposal:
        assert self.state is not None
        hidden, distributions = self.state, []
        newest = self.model.span([known - 1 for known in texts.known], texts.known).read(texts.tokens)[:, 0]
        for depth in range(1, count + 1):
            module = self.heads.of_depth(depth)
            if isinstance(module, MedusaModule):
                ready = module(self.state)
            else:
                ready = hidden = module(hidden, self.model.embedding_of(depth)(newest))
            newest, distribution = self.chooser.choose(ready, self.model.matrix_of(depth))
            texts.draft(depth - 1, newest)
            distributions.append(distribution)
        return proposal(texts, distributions)

    def keep(self, rows: list[int]) -> None:
        assert self.state is not None
        self.state = self.state[rows]
        self.positions = [self.positions[row] for row in rows]

    def join(self, other: Self) -> None:
        assert self.state is not None
        assert other.state is not None
        self.state = torch.cat((self.state, other.state))
        self.positions = self.positions + other.positions

    def _show(self, trunk: TrunkPass, ends: list[int]) -> None:
        states = trunk.after_norm if self.normed else trunk.before_norm
        span = self.model.span(self.positions, ends)
        self.state = span.last(states[:, : span.width])  # behind them stand rejected drafts
        self.positions = ends
