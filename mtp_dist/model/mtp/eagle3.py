"""EAGLE-3 (Li and others, arXiv 2503.01840, sections 3.1 and 3.2): a head on several trunk states, trained as it will draft.

g_i = W [taps at i], states of the trunk from low to high (`mtp.taps`). One layer serves every depth: h^k_i = Layer(Emb(t[i+k]),
h^{k-1}_i), h^0_i = g_i; norm and the shared head read h^k_i. Depth k = s + 1 is step s of a draft that starts behind position i;
it sees what a decoder's cache holds then ("training-time test"): the entries that stem from the trunk, (Emb(t[j+1]), g_j) at
positions j <= i, and the draft's own, (Emb(t[i+m]), h^{m-1}_i) at positions i+1 .. i+s, m = 2 .. k. So its own earlier steps are
visible at the same i alone: a diagonal for each. There is no loss on features; the paper weights step s by 0.8^s (`mtp.decay`).

The released training code hides the trunk's newest s entries from step s, too, which a decoder does not; here nothing is hidden.
Its draft vocabulary, the most frequent tokens (`mtp.draft_vocabulary`), is rows of the shared head, not a head of its own. A step
with s > 0 needs a mask of its own, so SDPA with a mask runs, whatever `train.attention` the blocks have; step s costs s + 1 times
the attention of a block.
"""

import torch
from torch import Tensor, nn

from mtp_dist.config.heads import fused_states
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask, document_mask
from mtp_dist.model.linear import Linear
from mtp_dist.model.mtp.heads import Feed, Heads, TrunkStates
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.trunk import Attention, FeedForward, KeyValueCache, RMSNorm, rotation


class Entries:
    """Keys and values of all steps so far, end to end: those from the trunk, then each step's own."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(key)
        self.values.append(value)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)


class Eagle3Module(nn.Module):
    """`fusion` is W of the definition above, the rest its Layer: attention over both parts side by side, twice as wide as the
    state that it adds to."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__()
        d = model.hidden
        self.fusion = Linear(len(fused_states(model, mtp)) * d, d, std=model.init_std, group=group)
        self.embedding_norm = RMSNorm(d, model.norm_eps, group)
        self.hidden_norm = RMSNorm(d, model.norm_eps, group)
        self.attention = Attention(model, group, inputs=2 * d)
        self.mlp_norm = RMSNorm(d, model.norm_eps, group)
        self.mlp = FeedForward(model, group)
        self.norm = RMSNorm(d, model.norm_eps, group)
        self.embedding_first = mtp.concat == "embedding_first"

    def forward(self, hidden: Tensor, embedded: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache) -> Tensor:
        """h^{k-1} and Emb(t[i+k]) -> h^k, all [B, n, d]; the cache has the entries that the mask speaks of, but this one's."""
        parts = (self.embedding_norm(embedded), self.hidden_norm(hidden))
        x = hidden + self.attention(torch.cat(parts if self.embedding_first else parts[::-1], dim=-1), turn, mask, cache)
        state: Tensor = x + self.mlp(self.mlp_norm(x))
        return state


class Eagle3Heads(Heads):
    """One module, D steps."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__({"1": Eagle3Module(model, mtp, group)}, mtp.depth)
        self.model, self.fused = model, fused_states(model, mtp)

    def forward(self, trunk: TrunkStates, feed: Feed, turn: Tensor, mask: Mask) -> list[Tensor]:
        module, entries, states = self["1"], Entries(), []
        length, device = turn.shape[1], turn.device
        hidden = module.fusion(torch.cat([trunk.taps.get(layer, trunk.before_norm) for layer in self.fused], dim=-1))  # type: ignore[operator, union-attr]
        if trunk.documents is not None:
            seen = document_mask(trunk.documents)
        else:
            seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
        own = torch.eye(length, dtype=torch.bool, device=device).expand_as(seen)
        for step in range(self.computed):
            if step:
                assert self.model.head_dim is not None
                turn = rotation(torch.arange(step, step + length, device=device), self.model.head_dim, self.model.rope_theta)
                seen = torch.cat((seen, own), dim=-1)
            hidden = module(hidden, feed(step + 1, hidden), turn, seen if step or mask is None else mask, entries)
            states.append(hidden)
        return states

    def ready(self, state: Tensor, trunk: TrunkStates) -> Tensor:
        normed: Tensor = self["1"].norm(state)  # type: ignore[operator, union-attr]
        return normed
