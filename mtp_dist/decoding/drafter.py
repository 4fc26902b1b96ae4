"""Drafters: where the tokens come from that the trunk verifies.

One interface. A drafter may be wrong without harm: ``verification`` decides, so a bad draft costs time, never text.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtp_dist.decoding.model import DecodingModel
from mtp_dist.decoding.sampling import Sampling, draw


@dataclass(frozen=True)
class DecodingState:
    """What is known before a draft.

    tokens int64 [B, n+1]: t[0] .. t[n]. before_norm, after_norm [B, m, d]: the trunk's states around its final norm, of
    those positions that the drafter has not been shown yet (the newest m of 0 .. n-1).
    """

    tokens: Tensor
    before_norm: Tensor
    after_norm: Tensor


@dataclass(frozen=True)
class Proposal:
    """tokens int64 [B, γ]: drafts of t[n+1] .. t[n+γ]. probabilities [B, γ, V]: the distributions they were drawn from; None if
    chance had no part in it (then each draft is the whole distribution)."""

    tokens: Tensor
    probabilities: Tensor | None


class Drafter(Protocol):
    """Drafts tokens of one batch of texts, from the first to the last."""

    def prefill(self, state: DecodingState) -> None:
        """The prompt: state.tokens [B, P] with the trunk's states of all P positions. Called once, first."""
        ...

    def propose(self, state: DecodingState, count: int) -> Proposal:
        """``count`` >= 1 drafts after state.tokens. Tokens drafted before and not found in state.tokens were rejected."""
        ...


class SequentialDrafter:
    """The model's own sequential MTP modules as a chain.

    With t[0 .. n] known, module k runs at position n-1 on h^{k-1} and Emb(t[n-1+k]), a draft from k = 2 on, and drafts t[n+k].
    Beyond depth D the last module is recycled, as models with a single module are used: it runs at the next position, on its own
    last state instead of that position's h^{D-1}, which is not known yet (both stand for the same target).

    Module k's cache entry of position j was made from t[j+k] and everything before. ``used`` remembers those tokens: at the next
    draft each cache is cropped to the entries whose tokens turned out right, and refilled from the true ones. Module k+1 lags
    behind module k, so the states between them wait in a window.
    """

    def __init__(
        self, model: DecodingModel, batch: int, sampling: Sampling, generator: torch.Generator | None, *, most: int
    ) -> None:
        """``most``: the largest count that will be asked for; modules beyond it are not run."""
        assert model.heads is not None
        self.model, self.sampling, self.generator = model, sampling, generator
        self.first = model.heads.first
        self.modules = model.heads.asked()[:most]
        self.caches = [model.cache(batch) for _ in self.modules]
        self.inputs = [model.window(batch) for _ in self.modules]  # h^{k-1}, what module k reads
        self.used = torch.empty(batch, 0, dtype=torch.int64, device=model.device)
        self.positions = 0

    def prefill(self, state: DecodingState) -> None:
        self._learn(state)
        for depth in range(1, len(self.modules) + 1):
            if depth < self.positions:
                self._run(depth, state.tokens, self.positions - depth)
        self._forget()

    def propose(self, state: DecodingState, count: int) -> Proposal:
        self._learn(state)
        tokens, distributions = state.tokens, []
        for depth in range(1, count + 1):
            if depth <= len(self.modules):
                ready, handed = self._run(depth, tokens, self.positions)
            else:
                ready, handed = self._recycle(handed, tokens)
            token, distribution = self._choose(self.model.logits(ready[:, -1]))
            tokens = torch.cat((tokens, token.unsqueeze(1)), dim=1)
            distributions.append(distribution)
        self.used = tokens
        self._forget()
        return Proposal(tokens[:, -count:], None if self.sampling.greedy else torch.stack(distributions, dim=1))

    def _learn(self, state: DecodingState) -> None:
        """Drop what was made from rejected tokens, or past the trunk's states of the time; take the new states in."""
        right = shared_prefix(self.used, state.tokens)
        for depth, cache in enumerate(self.caches, start=1):
            valid = min(self.positions, right - depth)
            cache.crop(valid)
            if depth < len(self.inputs):
                self.inputs[depth].crop(valid)
        self.inputs[0].append(self.first(state.before_norm, state.after_norm))
        self.positions, self.used = self.inputs[0].end, state.tokens

    def _run(self, depth: int, tokens: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Module ``depth`` over the positions from the end of its cache to ``end`` - 1."""
        cache = self.caches[depth - 1]
        hidden = self.inputs[depth - 1].since(cache.length)[:, : end - cache.length]
        ready, handed = self.model.module(self.modules[depth - 1], depth, hidden, tokens, cache)
        if depth < len(self.inputs):
            self.inputs[depth].append(handed)
        return ready, handed

    def _recycle(self, handed: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The last module at the position after its cache, on its own last state."""
        return self.model.module(self.modules[-1], len(self.modules), handed[:, -1:], tokens, self.caches[-1])

    def _forget(self) -> None:
        """Keep the states that a module has not read, or may have to read again since it read them with a draft."""
        for depth, (window, cache) in enumerate(zip(self.inputs, self.caches, strict=True), start=1):
            window.forget(min(cache.length, self.positions + 1 - depth))

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [B, V] -> (draft [B], its distribution [B, V]; greedy: the logits, which nobody reads)."""
        if self.sampling.greedy:
            return logits.argmax(-1), logits
        distribution = self.sampling.probabilities(logits)
        return draw(distribution, self.generator), distribution


def shared_prefix(a: Tensor, b: Tensor) -> int:
    """Tokens [B, n], [B, m] -> how many columns, from the first on, are equal in every row."""
    size = min(a.shape[1], b.shape[1])
    differs = (a[:, :size] != b[:, :size]).any(0).nonzero()
    return int(differs[0]) if len(differs) else size
