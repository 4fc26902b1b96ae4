"""The decoder's view of a model: trunk and MTP modules run over new positions only, with caches of the earlier ones.

Contract: states and logits are those of one uncached pass over each whole sequence, up to rounding, however long the other rows
of the batch are. As in training, attention stays inside a document where the model was trained so; the end-of-document token
belongs to the document it ends.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtp_dist.decoding.cache import HiddenStates, KeyValues, Span
from mtp_dist.model.attention import Mask
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.mtp.heads import Heads
from mtp_dist.model.trunk import Attention, KeyValueCache, rotation

Step = Callable[[Tensor, Tensor, Tensor, Mask, KeyValueCache | None], tuple[Tensor, Tensor]]
"""A module of a chain: (h^{k-1}, Emb(t[i+k]), turn, mask, cache) -> (state for the head, state for depth k+1)."""


class TrunkPass(NamedTuple):
    """States [B, n, d] of a pass of the trunk around its final norm; ``taps``: what entered the layers that the heads name."""

    before_norm: Tensor
    after_norm: Tensor
    taps: dict[int, Tensor]


class DecodingModel:
    """A whole model in one process.

    ``capacity``: positions that a sequence may have, drafts included. ``end``: the end-of-document token, None if texts never
    hold one. ``vocabulary``: entries of the tokenizer; the rows that pad the model's own vocabulary beyond it are never drawn.
    """

    def __init__(self, chunk: Chunk, capacity: int, *, end: int | None = None, vocabulary: int | None = None) -> None:
        assert chunk.first
        assert chunk.last
        assert chunk.embedding is not None
        assert chunk.model.head_dim is not None
        self.chunk, self.capacity, self.end_of_document = chunk, capacity, end
        self.embedding = chunk.embedding
        self.end = end if chunk.model.document_mask else None
        self.output = chunk.output_weight()[:vocabulary]
        self.dtype, self.device = self.output.dtype, self.output.device
        self.turn = rotation(torch.arange(capacity, device=self.device), chunk.model.head_dim, chunk.model.rope_theta)

    def beside(self, chunk: Chunk) -> "DecodingModel":
        """Another model for the same texts. Raises ValueError where it lacks tokens of this one's."""
        other = DecodingModel(chunk, self.capacity, end=self.end_of_document, vocabulary=len(self.output))
        if len(other.output) < len(self.output):
            raise ValueError(f"a model of {len(other.output)} tokens cannot draft for one of {len(self.output)}")
        return other

    @property
    def heads(self) -> Heads | None:
        """The MTP heads, of whatever kind."""
        return self.chunk.mtp

    @property
    def depth(self) -> int:
        """D."""
        return self.chunk.depth

    def cache(self, batch: int, module: nn.Module | None = None) -> KeyValues:
        """An empty cache for one block, or for all attention layers of a module."""
        config = self.chunk.model
        assert config.head_dim is not None
        layers = 1 if module is None else sum(isinstance(part, Attention) for part in module.modules())
        return KeyValues(
            batch, config.kv_heads, self.capacity, config.head_dim, dtype=self.dtype, device=self.device, layers=layers
        )

    def caches(self, batch: int) -> list[KeyValues]:
        """Empty caches for the trunk, one a layer."""
        return [self.cache(batch) for _ in self.chunk.layers]

    def hidden_states(self, batch: int) -> HiddenStates:
        """Room for one hidden state a position."""
        return HiddenStates(batch, self.capacity, self.chunk.model.hidden, dtype=self.dtype, device=self.device)

    def span(self, begin: list[int], end: list[int]) -> Span:
        """Positions begin[b] .. end[b] - 1 of each row."""
        return Span(begin, end, self.device)

    def trunk(self, tokens: Tensor, caches: list[KeyValues], ends: list[int] | None = None) -> TrunkPass:
        """tokens int64 [B, >= total], of which the caches (one a layer) hold the first ``lengths`` positions.

        Runs the positions from there to ends[b] (default: all), and returns their states; see ``Span`` for rows that run fewer.
        """
        span = self.span(caches[0].lengths, ends or [tokens.shape[1]] * len(tokens))
        turn, mask, tapped = self.turned(span), self.visible(tokens, span), {}
        hidden = self.embedding(span.read(tokens))
        for (number, block), cache in zip(self.chunk.layers.items(), caches, strict=True):
            if int(number) in self.chunk.taps:
                tapped[int(number)] = hidden
            hidden = block(hidden, turn, mask, cache.at(span))
        assert self.chunk.norm is not None
        return TrunkPass(hidden, self.chunk.norm(hidden), tapped)

    def module(
        self, module: Step, depth: int, hidden: Tensor, tokens: Tensor, cache: KeyValues, span: Span
    ) -> tuple[Tensor, Tensor]:
        """Run an MTP module that reads tokens as depth k over a span that follows its cache.

        hidden h^{k-1} [B, width, d]; tokens int64 [B, >= total + k]: position j reads t[j+k].
        Returns (state for the head, state for depth k+1), both [B, width, d].
        """
        embedded = self.embedding(span.read(tokens, ahead=depth))
        return module(hidden, embedded, self.turned(span), self.visible(tokens, span), cache.at(span))

    def logits(self, states: Tensor, matrix: Tensor | None = None) -> Tensor:
        """states [.., d] ready for the head -> [.., V], float32 or wider. matrix [>= V, d]: of another head than the main one."""
        logits = states @ (self.output if matrix is None else matrix[: len(self.output)]).T
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def turned(self, span: Span) -> Tensor:
        """The rotation of a span's positions: [2, n, c], or [2, B, 1, n, c] where rows differ."""
        if span.even:
            return self.turn[:, span.begin[0] : span.total]
        return self.turn[:, span.positions].unsqueeze(2)

    def visible(self, tokens: Tensor, span: Span) -> Tensor | None:
        """tokens [B, >= total] -> bool mask of a span's positions (rows) over all positions below total (columns); None: all is
        visible."""
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
