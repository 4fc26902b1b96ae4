"""Sequential causal MTP modules of DeepSeek-V3 (arXiv 2412.19437, section 2.2, equations 21-25).

Depth k at position i: x = W_k [norm(Emb(t[i+k])) ; norm(h^{k-1}_i)], h^k = Block_k(x), causal over i; then norm_k and the shared
head predict t[i+k+1]. Three choices differ between public sources and are settings recorded in every checkpoint: `mtp.concat`
(which half comes first), `mtp.h0` and `mtp.recycle` (whether a state is handed on before or after its norm). With `mtp.repeat`
one module serves every depth (FastMTP, arXiv 2509.18362).

With `mtp.scheduled_sampling` the token fed to depth k may be depth k-1's own prediction of t[i+k] at position i instead. With
`mtp.embedding=own` and `mtp.projection=own` a module reads and predicts tokens with matrices [V, d] of its own, as the class of
an explanatory document has it (its output layer also has a bias); DeepSeek-V3 shares both with the trunk.
"""

import torch
from torch import Tensor, nn

from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask
from mtp_dist.model.linear import Linear
from mtp_dist.model.mtp.heads import Feed, Heads, TrunkStates, build_blocks, numbered, own_embedding, own_projection
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.trunk import KeyValueCache, RMSNorm


class SequentialModule(nn.Module):
    """One depth: `projection` is W_k, `block` Block_k, `norm` norm_k of the definitions above; `embedding` and `head` (an output
    matrix) are None where they are shared."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__()
        d = model.hidden
        self.embedding_norm = RMSNorm(d, model.norm_eps, group)
        self.hidden_norm = RMSNorm(d, model.norm_eps, group)
        self.projection = Linear(2 * d, d, std=model.init_std, group=group)
        self.block = build_blocks(model, mtp, group)
        self.norm = RMSNorm(d, model.norm_eps, group)
        self.embedding, self.head = own_embedding(model, mtp, group), own_projection(model, mtp, group)
        self.embedding_first = mtp.concat == "embedding_first"
        self.recycle_normed = mtp.recycle == "post_norm"

    def forward(
        self, hidden: Tensor, embedded: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden h^{k-1} and embedded Emb(t[i+k]), both [B, n, d] -> (state for the head, state for depth k+1), both [B, n,
        d]."""
        parts = (self.embedding_norm(embedded), self.hidden_norm(hidden))
        x = self.projection(torch.cat(parts if self.embedding_first else parts[::-1], dim=-1))
        x = self.block(x, turn, mask, cache)
        normed = self.norm(x)
        return normed, normed if self.recycle_normed else x


class SequentialHeads(Heads):
    """D modules, or one D times."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__(numbered(SequentialModule, model, mtp, group), mtp.depth)
        self.first_normed = mtp.h0 == "post_norm"

    def first(self, before_norm: Tensor, after_norm: Tensor) -> Tensor:
        """h⁰, the trunk state that depth 1 reads."""
        return after_norm if self.first_normed else before_norm

    def forward(self, trunk: TrunkStates, feed: Feed, turn: Tensor, mask: Mask) -> list[Tensor]:
        hidden, ready = self.first(trunk.before_norm, trunk.after_norm), trunk.after_norm
        states = []
        for k, module in enumerate(self.asked(), start=1):
            ready, hidden = module(hidden, feed(k, ready), turn, mask)
            states.append(ready)
        return states
