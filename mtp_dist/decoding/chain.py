"""Drafts by heads that see the drafts before: a chain of modules with attention, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mtp_dist.decoding.drafter import Chooser, Proposal, proposal
from mtp_dist.decoding.model import DecodingModel, Step, TrunkPass
from mtp_dist.decoding.sampling import Sampling, Source
from mtp_dist.decoding.text import Snapshot, Texts
from mtp_dist.model.attention import Mask
from mtp_dist.model.mtp.eagle import EagleHeads, EagleModule
from mtp_dist.model.mtp.eagle3 import Eagle3Heads, Eagle3Module
from mtp_dist.model.mtp.sequential import SequentialHeads
from mtp_dist.model.trunk import KeyValueCache


@dataclass(frozen=True)
class Chain:
    """How heads draft: ``first`` makes h⁰ of the trunk's states; ``steps`` are the modules of depths 1, 2, .. that run at the
    same position. Behind the last of them it is recycled."""

    first: Callable[[TrunkPass], Tensor]
    steps: list[Step]


def chain_of(model: DecodingModel) -> Chain | None:
    """The chain that a model's heads are, if they are one."""
    heads, norm, depths = model.heads, model.chunk.norm, range(1, model.depth + 1)
    assert norm is not None
    if isinstance(heads, SequentialHeads):
        first = heads.first
        return Chain(lambda trunk: first(trunk.before_norm, trunk.after_norm), [heads[str(min(k, len(heads)))] for k in depths])
    if isinstance(heads, EagleHeads):
        return _eagle(heads, norm, model.depth)
    if isinstance(heads, Eagle3Heads):
        return _eagle3(heads)
    return None


def _eagle(heads: EagleHeads, norm: Callable[[Tensor], Tensor], depth: int) -> Chain:
    module, normed = heads["1"], heads.normed
    assert isinstance(module, EagleModule)

    def step(
        feature: Tensor, embedded: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor]:
        parts = (embedded, feature) if module.embedding_first else (feature, embedded)
        state = module.block(module.projection(torch.cat(parts, dim=-1)), turn, mask, cache)
        return (state if normed else norm(state)), state

    return Chain(lambda trunk: trunk.after_norm if normed else trunk.before_norm, [step] * depth)


def _eagle3(heads: Eagle3Heads) -> Chain:
    """One step: from the second draft on it runs where its training put it, at the next position, seeing its own entries."""
    module, fused = heads["1"], heads.fused
    assert isinstance(module, Eagle3Module)

    def first(trunk: TrunkPass) -> Tensor:
        found: Tensor = module.fusion(torch.cat([trunk.taps.get(layer, trunk.before_norm) for layer in fused], dim=-1))
        return found

    def step(hidden: Tensor, embedded: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:
        assert cache is not None
        state = module(hidden, embedded, turn, mask, cache)
        return module.norm(state), state

    return Chain(first, [step])


class ChainDrafter:
    """A chain of modules, each with a cache.

    With t[0 .. n] known, module k runs at position n-1 on h^{k-1} and Emb(t[n-1+k]), a draft from k = 2 on, and drafts t[n+k].
    Beyond the last module that one is recycled, as models with a single module are used: it runs at the next position, on its own
    last state instead of that position's h^{k-1}, which is not known yet (both stand for the same target).

    Module k's cache entry of position j was made from t[j+k] and everything before. ``used`` remembers those tokens: before the
    next draft each row of each cache is cropped to the entries whose tokens turned out right, and refilled from the true ones.
    Module k+1 lags behind module k, so the states between them are kept.
    """

    def __init__(
        self, model: DecodingModel, chain: Chain, batch: int, sampling: Sampling, source: Source, *, most: int
    ) -> None:
        """``most``: the largest count that will be asked for; modules beyond it are not run."""
        self.model, self.first, self.steps = model, chain.first, chain.steps[:most]
        self.chooser = Chooser(model, sampling, source)
        assert model.heads is not None
        module = model.heads["1"]  # all are alike
        self.caches = [model.cache(batch, module) for _ in self.steps]
        self.inputs = [model.hidden_states(batch) for _ in self.steps]  # h^{k-1}, what module k reads
        self.positions = [0] * batch  # the trunk's states shown
        self.used: Snapshot | None = None

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self._show(trunk, list(texts.known))
        for depth in range(1, len(self.steps) + 1):
            ends = [max(positions - depth, 0) for positions in self.positions]
            if max(ends) > 0:
                self._run(depth, texts.tokens, ends)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        self._forget(texts)
        self._show(trunk, [known - 1 for known in texts.known])

    def propose(self, texts: Texts, count: int) -> Proposal:
        distributions: list[Tensor | None] = []
        for depth in range(1, count + 1):
            if depth <= len(self.steps):
                ready, handed = self._run(depth, texts.tokens, self.positions)
            else:
                ready, handed = self._recycle(handed, texts.tokens)
            token, distribution = self.chooser.choose_drafted(ready, self.model.matrix_of(depth))
            texts.draft(depth - 1, token)
            distributions.append(distribution)
        self.used = Snapshot(texts, count)
        return proposal(texts, distributions)

    def keep(self, rows: list[int]) -> None:
        for cache, states in zip(self.caches, self.inputs, strict=True):
            cache.keep(rows)
            states.keep(rows)
        self.positions = [self.positions[row] for row in rows]
        if self.used is not None:
            self.used.keep(rows)

    def join(self, other: Self) -> None:
        assert self.used is None
        assert other.used is None
        for own, new in zip(self.caches, other.caches, strict=True):
            own.join(new)
        for states, more in zip(self.inputs, other.inputs, strict=True):
            states.join(more)
        self.positions = self.positions + other.positions

    def _forget(self, texts: Texts) -> None:
        """Drop what was made from rejected tokens, or past the trunk's states of the time."""
        if self.used is None:
            return
        right = self.used.right(texts)
        for depth, cache in enumerate(self.caches, start=1):
            valid = [min(positions, same - depth) for positions, same in zip(self.positions, right, strict=True)]
            cache.crop(valid)
            if depth < len(self.inputs):
                self.inputs[depth].crop(valid)
        self.used = None

    def _show(self, trunk: TrunkPass, ends: list[int]) -> None:
        self.inputs[0].write(self.model.span(self.positions, ends), self.first(trunk))
        self.positions = ends

    def _run(self, depth: int, tokens: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
        """Module ``depth`` over the positions from the ends of its cache to ends[b] - 1; its two states [B, d] of the last."""
        cache = self.caches[depth - 1]
        span = self.model.span(cache.lengths, ends)
        hidden = self.inputs[depth - 1].read(span)
        ready, handed = self.model.module(self.steps[depth - 1], depth, hidden, tokens, cache, span)
        if depth < len(self.inputs):
            self.inputs[depth].write(span, handed)
        return span.last(ready), span.last(handed)

    def _recycle(self, handed: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The last module at the position after its cache, on its own last state [B, d]."""
        cache = self.caches[-1]
        span = self.model.span(cache.lengths, [length + 1 for length in cache.lengths])
        ready, handed = self.model.module(self.steps[-1], len(self.steps), handed.unsqueeze(1), tokens, cache, span)
        return ready[:, -1], handed[:, -1]
