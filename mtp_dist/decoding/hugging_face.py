"""Drafts by a causal model of `transformers` with the same tokenizer, one token a pass.

Its cache takes the same number of slots of every row in each pass, and rows differ in length. So a slot may hold nothing of a
row: a copy that fills the row up, or a token that was rejected. Such slots are hidden by the attention mask, and positions are
given; slots at the end that no row needs are cropped. Where hidden slots pile up, the texts are run anew.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.decoding.drafter import Proposal, pick, proposal
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Sampling, Source
from mtp_dist.decoding.text import Snapshot, Texts


class HuggingFaceDrafter:
    """An independent model. Texts that grow beyond its positions get no drafts."""

    def __init__(self, model: DecodingModel, other: nn.Module, batch: int, sampling: Sampling, source: Source) -> None:
        """``model``: the one whose texts these are. ``other``: see ``interop.causal_model.load_causal_model``."""
        self.model, self.sampling, self.source = model, sampling, source
        self.other: Any = other
        positions = getattr(self.other.config, "max_position_embeddings", None)
        self.positions = model.capacity if positions is None else int(positions)
        self.used: Snapshot | None = None
        self.cache: Any = None
        self.slots = torch.zeros(batch, 0, dtype=torch.int64, device=model.device)  # 1: holds a token of the row
        self.lengths = [0] * batch
        self._clear()

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        if max(texts.known) <= self.positions:
            self._run(texts, texts.known, last_only=True)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        if self.used is not None:
            # The newest token is run again, should it be there: a draft is made of its logits.
            self._forget([min(same, known - 1) for same, known in zip(self.used.right(texts), texts.known, strict=True)])
            self.used = None

    def propose(self, texts: Texts, count: int) -> Proposal:
        if max(texts.known) + count - 1 > self.positions:
            return Proposal(texts.drafts(0), None)
        if self.slots.shape[1] > 2 * self.model.capacity:
            self._clear()
        distributions = []
        for place in range(count):
            logits = self._run(texts, [known + place for known in texts.known])[:, : self.model.vocabulary]
            token, distribution = pick(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.sampling, self.source)
            texts.draft(place, token)
            distributions.append(distribution)
        self.used = Snapshot(texts, count)
        return proposal(texts, distributions)

    def keep(self, rows: list[int]) -> None:
        if self.slots.shape[1]:
            self.cache.batch_select_indices(torch.tensor(rows, device=self.slots.device))
        self.slots = self.slots[rows]
        self.lengths = [self.lengths[row] for row in rows]
        if self.used is not None:
            self.used.keep(rows)

    def join(self, other: Self) -> None:
        assert self.used is None
        assert other.used is None
        width = max(self.slots.shape[1], other.slots.shape[1])
        full = min(self.slots.shape[1], other.slots.shape[1]) > 0
        if full:
            for own, new in zip(self.cache.layers, other.cache.layers, strict=True):
                own.keys = torch.cat([F.pad(keys, (0, 0, 0, width - keys.shape[2])) for keys in (own.keys, new.keys)])
                own.values = torch.cat([F.pad(values, (0, 0, 0, width - values.shape[2])) for values in (own.values, new.values)])
        self.slots = torch.cat([F.pad(slots, (0, width - slots.shape[1])) for slots in (self.slots, other.slots)])
        self.lengths = self.lengths + other.lengths
        if not full:
            self._clear()

    def _clear(self) -> None:
        from transformers import DynamicCache

        self.cache, self.slots, self.lengths = DynamicCache(), self.slots[:, :0], [0] * len(self.lengths)

    def _run(self, texts: Texts, ends: list[int], *, last_only: bool = False) -> Tensor:
        """Run each row's tokens from the end of its cache to ends[b] - 1; logits [B, V] of the last of each. ``last_only``: they
        are not asked for, and mean nothing."""
        span = self.model.span(self.lengths, ends)
        inside = torch.ones_like(span.positions) if span.inside is None else span.inside.long()
        self.slots = torch.cat((self.slots, inside), dim=1)
        found = self.other(
            input_ids=span.read(texts.tokens),
            attention_mask=self.slots,
            position_ids=span.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        self.lengths = list(ends)
        self._count(span.width)
        logits: Tensor = found.logits[:, -1] if last_only else span.last(found.logits)
        return logits

    def _count(self, width: int) -> None:
        """A pass over `width` tokens, as a cache would see it that is written in place (the one at hand is copied by each)."""
        for layer in self.cache.layers:
            rows, _, slots, _ = layer.keys.shape
            held = (layer.keys.nbytes + layer.values.nbytes) // rows
            self.model.drafter_traffic.read += held
            self.model.drafter_traffic.written += held * min(width, slots) // slots

    def _forget(self, lengths: list[int]) -> None:
        """Keep the first lengths[b] tokens of each row."""
        most = torch.tensor(lengths, device=self.slots.device).unsqueeze(1)
        self.slots = self.slots * (self.slots.cumsum(1) <= most)
        self.lengths = [min(length, bound) for length, bound in zip(self.lengths, lengths, strict=True)]
        needed = self.slots.any(0).nonzero()
        empty = self.slots.shape[1] - (int(needed[-1]) + 1 if len(needed) else 0)
        if empty:
            self.cache.crop(-empty)
            self.slots = self.slots[:, :-empty]
