"""Drafts by the model's own sequential MTP modules, one after the other."""

from torch import Tensor, nn

from mtp_dist.decoding.cache import Span
from mtp_dist.decoding.drafter import Chooser, Proposal, proposal
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Sampling, Source
from mtp_dist.decoding.text import Texts, shared
from mtp_dist.model.mtp.sequential import SequentialHeads


class SequentialDrafter:
    """A chain of sequential modules.

    With t[0 .. n] known, module k runs at position n-1 on h^{k-1} and Emb(t[n-1+k]), a draft from k = 2 on, and drafts t[n+k].
    Beyond depth D the last module is recycled, as models with a single module are used: it runs at the next position, on its own
    last state instead of that position's h^{D-1}, which is not known yet (both stand for the same target).

    Module k's cache entry of position j was made from t[j+k] and everything before. ``used`` remembers those tokens: before the
    next draft each row of each cache is cropped to the entries whose tokens turned out right, and refilled from the true ones.
    Module k+1 lags behind module k, so the states between them are kept.
    """

    def __init__(self, model: DecodingModel, batch: int, sampling: Sampling, source: Source, *, most: int) -> None:
        """``most``: the largest count that will be asked for; modules beyond it are not run."""
        heads = model.heads
        assert isinstance(heads, SequentialHeads)
        self.model, self.first = model, heads.first
        self.chooser = Chooser(model, sampling, source)
        self.modules: list[nn.Module] = [heads[str(min(k, len(heads)))] for k in range(1, min(model.depth, most) + 1)]
        self.caches = [model.cache(batch) for _ in self.modules]
        self.inputs = [model.hidden_states(batch) for _ in self.modules]  # h^{k-1}, what module k reads
        self.positions = [0] * batch  # the trunk's states shown
        self.used: Tensor | None = None
        self.used_lengths = [0] * batch

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self._show(trunk, list(texts.known))
        for depth in range(1, len(self.modules) + 1):
            ends = [max(positions - depth, 0) for positions in self.positions]
            if max(ends) > 0:
                self._run(depth, texts.tokens, ends)
        self._remember(texts, 0)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        self._forget(texts)
        self._show(trunk, [known - 1 for known in texts.known])

    def propose(self, texts: Texts, count: int) -> Proposal:
        distributions: list[Tensor | None] = []
        for depth in range(1, count + 1):
            if depth <= len(self.modules):
                ready, handed = self._run(depth, texts.tokens, self.positions)
            else:
                ready, handed = self._recycle(handed, texts.tokens)
            token, distribution = self.chooser.choose(ready)
            texts.draft(depth - 1, token)
            distributions.append(distribution)
        self._remember(texts, count)
        return proposal(texts, distributions)

    def keep(self, rows: list[int]) -> None:
        for cache, states in zip(self.caches, self.inputs, strict=True):
            cache.keep(rows)
            states.keep(rows)
        self.positions = [self.positions[row] for row in rows]
        self.used_lengths = [self.used_lengths[row] for row in rows]
        self.used = self.used[rows] if self.used is not None else None

    def _remember(self, texts: Texts, drafts: int) -> None:
        self.used, self.used_lengths = texts.tokens.clone(), [known + drafts for known in texts.known]

    def _forget(self, texts: Texts) -> None:
        """Drop what was made from rejected tokens, or past the trunk's states of the time."""
        assert self.used is not None
        right = shared(self.used, texts.tokens, [min(ends) for ends in zip(self.used_lengths, texts.known, strict=True)])
        for depth, cache in enumerate(self.caches, start=1):
            valid = [min(positions, same - depth) for positions, same in zip(self.positions, right, strict=True)]
            cache.crop(valid)
            if depth < len(self.inputs):
                self.inputs[depth].crop(valid)

    def _show(self, trunk: TrunkPass, ends: list[int]) -> None:
        self.inputs[0].write(self.model.span(self.positions, ends), self.first(trunk.before_norm, trunk.after_norm))
        self.positions = ends

    def _run(self, depth: int, tokens: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
        """Module ``depth`` over the positions from the ends of its cache to ends[b] - 1; its two states [B, d] of the last."""
        cache = self.caches[depth - 1]
        span = self.model.span(cache.lengths, ends)
        hidden = self.inputs[depth - 1].read(span)
        ready, handed = self.model.module(self.modules[depth - 1], depth, hidden, tokens, cache, span)
        if depth < len(self.inputs):
            self.inputs[depth].write(span, handed)
        return span.last(ready), span.last(handed)

    def _recycle(self, handed: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The last module at the position after its cache, on its own last state [B, d]."""
        cache = self.caches[-1]
        span: Span = self.model.span(cache.lengths, [length + 1 for length in cache.lengths])
        depth = len(self.modules)
        ready, handed = self.model.module(self.modules[-1], depth, handed.unsqueeze(1), tokens, cache, span)
        return ready[:, -1], handed[:, -1]
