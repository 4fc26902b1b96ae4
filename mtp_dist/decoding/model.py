"""The decoder's view of a model: trunk and MTP modules run over new positions only, with caches of the earlier ones.

Contract: states and logits are those of one uncached pass over each whole sequence, up to rounding, however long the other rows
of the batch are. As in training, attention stays inside a document where the model was trained so; the end-of-document token
belongs to the document it ends.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mtp_dist.config.layout import key_value_sharers
from mtp_dist.decoding.cache import HiddenStates, KeyValues, Span, Traffic
from mtp_dist.decoding.fused import FusedBlock
from mtp_dist.decoding.product import packed
from mtp_dist.decoding.tree import Branches
from mtp_dist.model.attention import FEW, Mask, shared
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.embedding import Embedding
from mtp_dist.model.mtp.heads import Heads
from mtp_dist.model.trunk import Attention, KeyValueCache, rotation

T = TypeVar("T")

Step = Callable[[Tensor, Tensor, Tensor, Mask, KeyValueCache | None], tuple[Tensor, Tensor]]
"""A module of a chain: (h^{k-1}, Emb(t[i+k]), turn, mask, cache) -> (state for the head, state for depth k+1)."""


class TrunkPass(NamedTuple):
    """States [B, n, d] of a pass of the trunk around its final norm; ``taps``: what entered the layers that the heads name."""

    before_norm: Tensor
    after_norm: Tensor
    taps: dict[int, Tensor]

    def picked(self, places: Tensor) -> "TrunkPass":
        """places int64 [B, w] -> the states [B, w, d] that stood there."""
        rows = torch.arange(len(places), device=places.device).unsqueeze(1)
        taps = {layer: states[rows, places] for layer, states in self.taps.items()}
        return TrunkPass(self.before_norm[rows, places], self.after_norm[rows, places], taps)


class DecodingModel:
    """A whole model in one process.

    ``capacity``: positions that a sequence may have, drafts included. ``end``: the end-of-document token, None if texts never
    hold one. ``vocabulary``: entries of the tokenizer; the rows that pad the model's own vocabulary beyond it are never drawn.
    """

    def __init__(
        self, chunks: Chunk | Sequence[Chunk], capacity: int, *, end: int | None = None, vocabulary: int | None = None
    ) -> None:
        self.chunks = [chunks] if isinstance(chunks, Chunk) else list(chunks)
        self.chunk, self.capacity, self.end_of_document = self.chunks[-1], capacity, end
        config = self.chunk.model
        assert config.head_dim is not None
        assert config.vocab_size is not None
        self.end = end if config.document_mask else None
        self.vocabulary = config.vocab_size if vocabulary is None else min(vocabulary, config.vocab_size)
        weight = next(self.chunk.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self.turn = rotation(torch.arange(capacity, device=self.device), config.head_dim, config.rope_theta)
        self.trunk_traffic, self.drafter_traffic = Traffic(), Traffic()

    def beside(self, chunk: Chunk) -> "DecodingModel":
        """Another model, whole in this process, that drafts for it. Raises ValueError where it lacks tokens of this one's."""
        other = DecodingModel(chunk, self.capacity, end=self.end_of_document, vocabulary=self.vocabulary)
        if other.vocabulary < self.vocabulary:
            raise ValueError(f"a model of {other.vocabulary} tokens cannot draft for one of {self.vocabulary}")
        other.trunk_traffic = other.drafter_traffic = self.drafter_traffic
        return other

    def decide(self, states: Tensor, rule: Callable[[Tensor], T]) -> T:
        """What ``rule`` makes of the logits of the trunk's states [.., d]: numbers, no tensors. One process decides for all."""
        return rule(self.logits(states))

    def agreed(self, value: T) -> T:
        """A value as the process that decides has it."""
        return value

    def same(self, tokens: Tensor) -> Tensor:
        """Drafts as the process that decides has drawn them, on each that drafts with it."""
        return tokens

    @property
    def embedding(self) -> Embedding:
        """The one of the trunk and of the drafts, where this process has it."""
        found = self.chunk.embedding or self.chunks[0].embedding
        assert found is not None
        return found

    def embedding_of(self, depth: int) -> Embedding:
        """The one that a depth reads."""
        assert self.heads is not None
        return self.heads.embedding(depth) or self.embedding

    def matrix_of(self, depth: int) -> Tensor | None:
        """The output matrix of a depth's own, if it has one."""
        assert self.heads is not None
        own = self.heads.projection(depth)
        return None if own is None else own.weight

    @property
    def heads(self) -> Heads | None:
        """The MTP heads, of whatever kind."""
        return self.chunk.mtp

    @property
    def key_heads(self) -> int:
        """K: key/value heads of this process; one at least, where tensor ranks share them."""
        group = self.chunk.group
        return self.chunk.model.kv_heads * key_value_sharers(self.chunk.model, group.size) // group.size

    @property
    def depth(self) -> int:
        """D."""
        return self.chunk.depth

    def cache(self, batch: int, module: nn.Module | None = None) -> KeyValues:
        """An empty cache for a drafting block, or for all attention layers of a module."""
        layers = 1 if module is None else sum(isinstance(part, Attention | FusedBlock) for part in module.modules())
        return self._cache(batch, layers, self.drafter_traffic)

    def caches(self, batch: int) -> list[KeyValues]:
        """Empty caches for the trunk, one a layer of this process; where it has none, one that counts positions only."""
        layers = [1 for chunk in self.chunks for _ in chunk.layers] or [0]
        return [self._cache(batch, count, self.trunk_traffic) for count in layers]

    def _cache(self, batch: int, layers: int, traffic: Traffic) -> KeyValues:
        config = self.chunk.model
        assert config.head_dim is not None
        return KeyValues(
            batch,
            self.key_heads,
            self.capacity,
            config.head_dim,
            dtype=self.dtype,
            device=self.device,
            layers=layers,
            traffic=traffic,
        )

    def moved(self) -> tuple[Traffic, Traffic]:
        """What went through this process's caches since the last call: the trunk's, and those of whatever drafts."""
        return self.trunk_traffic.take(), self.drafter_traffic.take()

    def hidden_states(self, batch: int) -> HiddenStates:
        """Room for one hidden state a position."""
        return HiddenStates(batch, self.capacity, self.chunk.model.hidden, dtype=self.dtype, device=self.device)

    def span(self, begin: list[int], end: list[int]) -> Span:
        """Positions begin[b] .. end[b] - 1 of each row."""
        return Span(begin, end, self.device)

    def trunk(
        self, tokens: Tensor, caches: list[KeyValues], ends: list[int] | None = None, branches: Branches | None = None
    ) -> TrunkPass:
        """tokens int64 [B, >= total], of which the caches (one a layer) hold the first ``lengths`` positions.

        Runs the positions from there to ends[b] (default: all), and returns their states; see ``Span`` for rows that run fewer.
        ``branches``: what stands behind the known tokens is a tree.
        """
        span = self.span(caches[0].lengths, ends or [tokens.shape[1]] * len(tokens))
        turn, mask, waiting = self.turned(span, branches), self.visible(tokens, span, branches), iter(caches)
        carried = None
        for place, chunk in enumerate(self.chunks):
            carried = self.embedding(span.read(tokens)) if chunk.first else self.received(place, carried, span)
            hidden, *earlier = carried.chunk(chunk.states_in, dim=-1)
            tapped = dict(zip(chunk.received, earlier, strict=True))
            for number, block in chunk.layers.items():
                if int(number) in chunk.taps:
                    tapped[int(number)] = hidden
                hidden = block(hidden, turn, mask, next(waiting).at(span))
            if not chunk.last:
                carried = torch.cat((hidden, *(tapped[tap] for tap in chunk.handed)), dim=-1)
                self.hand_on(place, carried)
        caches[0].lengths = list(span.end)  # also where this process has no layer
        return TrunkPass(hidden, hidden if self.chunk.norm is None else self.chunk.norm(hidden), tapped)

    def received(self, place: int, carried: Tensor | None, span: Span) -> Tensor:
        """What chunk number ``place`` of this process reads: the states [B, width, ..] of the chunk before it. ``carried``: what
        this process has handed on last."""
        raise NotImplementedError("a model in one process is one chunk")

    def hand_on(self, place: int, states: Tensor) -> None:
        """Chunk number ``place`` of this process has made these states for the next one."""
        raise NotImplementedError("a model in one process is one chunk")

    def module(
        self,
        module: Step,
        depth: int,
        hidden: Tensor,
        tokens: Tensor,
        cache: KeyValues,
        span: Span,
        branches: Branches | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run an MTP module that reads tokens as depth k over a span that follows its cache.

        hidden h^{k-1} [B, width, d]; tokens int64 [B, >= total + k]: position j reads t[j+k].
        Returns (state for the head, state for depth k+1), both [B, width, d].
        """
        embedded = self.embedding_of(depth)(span.read(tokens, ahead=depth))
        return module(hidden, embedded, self.turned(span, branches), self.visible(tokens, span, branches), cache.at(span))

    def logits(self, states: Tensor, matrix: Tensor | None = None) -> Tensor:
        """states [.., d] ready for the head -> [.., V], float32 or wider. matrix [>= V, d]: of another head than the main one."""
        rows = self.chunk.output_weight() if matrix is None else matrix
        product = packed(rows)
        logits = states @ rows[: self.vocabulary].T if product is None else product(states)[..., : self.vocabulary]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @cached_property
    def drafted(self) -> Tensor | None:
        """int64 [n], ascending: the tokens that a chain drafts among; None: all."""
        known = self.chunk.drafted_tokens()
        return None if known is None else known.tokens

    @cached_property
    def _drafted_rows(self) -> Tensor:
        """[n, d], a copy: picked once, not a draft at a time."""
        return self.chunk.output_weight()[self.drafted]

    def draft_logits(self, states: Tensor, matrix: Tensor | None = None) -> Tensor:
        """As ``logits``, of the tokens ``drafted`` alone: [.., n]."""
        if self.drafted is None:
            return self.logits(states, matrix)
        product = packed(self.drafted)
        if product is None:
            return self.logits(states, self._drafted_rows)
        return product(states).to(torch.float32)

    def turned(self, span: Span, branches: Branches | None = None) -> Tensor:
        """The rotation of a span's positions: [2, n, c], or [2, B, 1, n, c] where rows differ."""
        if branches is not None:
            return self.turn[:, branches.positions(span)].unsqueeze(2)
        if span.even:
            return self.turn[:, span.begin[0] : span.total]
        return self.turn[:, span.positions].unsqueeze(2)

    def visible(self, tokens: Tensor, span: Span, branches: Branches | None = None) -> Mask:
        """tokens int64 [B, >= total] -> who sees whom, a span's positions over all positions below total; None: all is seen."""
        mask = self._visible(tokens, span, branches)
        if mask is None or self.device.type != "cpu" or not 1 < span.width <= FEW:
            return mask
        return shared(mask, self.chunk.model.heads // self.chunk.group.size // self.key_heads, self.dtype)

    def _visible(self, tokens: Tensor, span: Span, branches: Branches | None) -> Tensor | None:
        """bool, rows over columns."""
        if branches is not None:
            return branches.visible(tokens, span, self.end)
        columns = torch.arange(span.total, device=self.device)
        if self.end is not None:
            ends = (tokens[:, : span.total] == self.end).long()
            if ends[:, :-1].any():
                documents = ends.cumsum(1) - ends
                same = span.read(documents).unsqueeze(2) == documents.unsqueeze(1)
                return (same & (columns <= span.positions.unsqueeze(2))).unsqueeze(1)
        if not span.even:
            return (columns <= span.positions.unsqueeze(2)).unsqueeze(1)
        return None if span.width == 1 else columns <= span.positions[0].unsqueeze(1)
