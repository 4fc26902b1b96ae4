"""The decoder's view of a model: trunk and MTP modules run over new positions only, with caches of the earlier ones.

Contract: states and logits are those of one uncached pass over the whole sequence, up to rounding. As in training, attention
stays inside a document where the model was trained so; the end-of-document token belongs to the document it ends.
"""

import torch
from torch import Tensor, nn

from mtp_dist.decoding.cache import KeyValues, Window
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.mtp.sequential import SequentialHeads
from mtp_dist.model.trunk import rotation


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
        self.chunk, self.capacity = chunk, capacity
        self.embedding = chunk.embedding
        self.end = end if chunk.model.document_mask else None
        self.output = chunk.output_weight()[:vocabulary]
        self.dtype, self.device = self.output.dtype, self.output.device
        self.turn = rotation(torch.arange(capacity, device=self.device), chunk.model.head_dim, chunk.model.rope_theta)

    @property
    def heads(self) -> SequentialHeads | None:
        """The modules that a drafter can run; other kinds have none yet."""
        return self.chunk.mtp if isinstance(self.chunk.mtp, SequentialHeads) else None

    def cache(self, batch: int) -> KeyValues:
        """An empty cache for one block."""
        config = self.chunk.model
        assert config.head_dim is not None
        return KeyValues(batch, config.kv_heads, self.capacity, config.head_dim, dtype=self.dtype, device=self.device)

    def window(self, batch: int) -> Window:
        """An empty window of hidden states."""
        return Window(batch, self.chunk.model.hidden, dtype=self.dtype, device=self.device)

    def trunk(self, tokens: Tensor, caches: list[KeyValues]) -> tuple[Tensor, Tensor]:
        """tokens int64 [B, total], of which the caches (one a layer) hold the first ``length`` positions.

        Runs the others and returns their states [B, total - length, d] before and after the final norm.
        """
        begin, end = caches[0].length, tokens.shape[1]
        turn, mask = self.turn[:, begin:end], self.visible(tokens, begin)
        hidden = self.embedding(tokens[:, begin:])
        for block, cache in zip(self.chunk.layers.values(), caches, strict=True):
            hidden = block(hidden, turn, mask, cache)
        assert self.chunk.norm is not None
        return hidden, self.chunk.norm(hidden)

    def module(self, module: nn.Module, depth: int, hidden: Tensor, tokens: Tensor, cache: KeyValues) -> tuple[Tensor, Tensor]:
        """Run an MTP module as depth k over the n positions that follow its cache.

        hidden h^{k-1} [B, n, d]; tokens int64 [B, > length + n - 1 + k]: position j reads t[j+k].
        Returns (state for the head, state for depth k+1), both [B, n, d].
        """
        begin, end = cache.length, cache.length + hidden.shape[1]
        embedded = self.embedding(tokens[:, begin + depth : end + depth])
        return module(hidden, embedded, self.turn[:, begin:end], self.visible(tokens[:, :end], begin), cache)

    def logits(self, states: Tensor) -> Tensor:
        """states [.., d] ready for the head -> [.., V], float32 or wider."""
        logits = states @ self.output.T
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def visible(self, tokens: Tensor, begin: int) -> Tensor | None:
        """tokens [B, total] -> bool mask of positions begin .. total-1 (rows) over all (columns); None: all is visible."""
        total = tokens.shape[1]
        causal = torch.ones(total - begin, total, dtype=torch.bool, device=self.device).tril(begin)
        if self.end is not None:
            ends = (tokens == self.end).long()
            if ends[:, :-1].any():
                documents = ends.cumsum(1) - ends
                return (causal & (documents[:, begin:, None] == documents[:, None, :])).unsqueeze(1)
        return None if total - begin == 1 else causal
