"""The model of an explanatory notebook on MTP, as it was meant: a public class, and the same transition as a kind of head.

Depth k at position i: x = RMSNorm(W_k [h^{k-1}_i ; Emb(t[i+k])] + b_k), h^k = Layer_k(x), and the embedding matrix predicts
t[i+k+1] from h^k. The RMSNorm has no weight, and its eps stands inside the mean's root. Layer_k is torch's post-norm
``nn.TransformerEncoderLayer`` (ReLU, biases) over a sequence of one: no position sees another, so attention is its value alone.
h⁰ is the embedding, or what the caller gives; as a kind of head it is the trunk's output.

What the notebook's code really does, each shown in tests/model/test_notebook.py:

- its layers have ``batch_first=False`` and get [B, 1, d]: torch takes the rows of the batch for one sequence, and every row
  attends to all others;
- its layers keep torch's default dropout of 0.1, so a training pass is random;
- its RMSNorm computes ``keepdim=True+eps`` inside the call of mean: torch refuses that with a TypeError, so no forward pass ever
  ends; were it taken for True, there would be no eps at all, and a state of zeros would become nan.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask
from mtp_dist.model.linear import Affine
from mtp_dist.model.mtp.heads import Feed, Heads, TrunkStates, numbered, own_embedding, own_projection
from mtp_dist.model.parameter import parameter
from mtp_dist.model.tensor_group import TensorGroup

RMS_EPS = 1e-8
"""The notebook's."""
LAYER_NORM_EPS = 1e-5
"""That of torch's encoder layer."""


class SimpleMTP(nn.Module):
    """D = `num_heads` chained heads on a shared embedding, in one process; no part of the harness is needed.

    `n_head` divides `d_model` and changes no value: alone, a position attends to itself in each attention head. For the same
    reason queries and keys get no gradient. `feed_forward`: inner width of the layers, torch's default.
    """

    def __init__(self, d_model: int, vocab_size: int, num_heads: int = 3, n_head: int = 2, *, feed_forward: int = 2048) -> None:
        super().__init__()
        self.d_model, self.vocab_size, self.num_heads = d_model, vocab_size, num_heads
        self.embed = nn.Embedding(vocab_size, d_model)
        self.projections = nn.ModuleList(nn.Linear(2 * d_model, d_model) for _ in range(num_heads))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, n_head, feed_forward, dropout=0.0, batch_first=True) for _ in range(num_heads)
        )

    def forward(self, token_ids: Tensor, init_hidden: Tensor | None = None) -> Tensor:
        """token_ids int64 (B, T), init_hidden (B, T, d) or None for the embeddings -> logits (B, T-D, D, V): entry (i, k-1)
        predicts token i+k+1. Raises ValueError unless T > D."""
        given = token_ids.shape[1]
        positions = given - self.num_heads
        if positions < 1:
            raise ValueError(f"{given} tokens are too few for {self.num_heads} heads; give {self.num_heads + 1} or more")
        embedded = self.embed(token_ids)
        state = (embedded if init_hidden is None else init_hidden)[:, :positions]
        logits = []
        for k, (projection, layer) in enumerate(zip(self.projections, self.layers, strict=True), start=1):
            state = alone(layer, rms_norm(projection(torch.cat((state, embedded[:, k : k + positions]), dim=-1))))
            logits.append(F.linear(state, self.embed.weight))
        return torch.stack(logits, dim=2)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


def alone(layer: nn.Module, x: Tensor) -> Tensor:
    """A post-norm ``nn.TransformerEncoderLayer`` without dropout where every position of x [.., d] sees itself only."""
    assert isinstance(layer, nn.TransformerEncoderLayer)
    attention = layer.self_attn
    assert attention.in_proj_weight is not None
    first = 2 * x.shape[-1]  # behind queries and keys
    value = F.linear(x, attention.in_proj_weight[first:], attention.in_proj_bias[first:])
    x = layer.norm1(x + attention.out_proj(value))
    out: Tensor = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
    return out


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (arXiv 1607.06450)."""

    def __init__(self, hidden: int, group: TensorGroup) -> None:
        super().__init__()
        self.weight = parameter((hidden,), split=None, std=None, group=group)
        self.bias = parameter((hidden,), split=None, std=0.0, group=group)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)


class PositionLayer(nn.Module):
    """What is left of the encoder layer for a position alone: [B, n, d] -> [B, n, d], whole on every tensor rank."""

    def __init__(self, model: ModelConfig, group: TensorGroup) -> None:
        super().__init__()
        d, std = model.hidden, model.init_std
        self.value = Affine(d, d, std=std, group=group)
        self.output = Affine(d, d, std=std, group=group)
        self.attention_norm = LayerNorm(d, group)
        self.up = Affine(d, model.mlp, std=std, group=group)
        self.down = Affine(model.mlp, d, std=std, group=group)
        self.mlp_norm = LayerNorm(d, group)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.output(self.value(x)))
        out: Tensor = self.mlp_norm(x + self.down(F.relu(self.up(x))))
        return out


class NotebookModule(nn.Module):
    """One depth: the projection of two states to one, and its layers, keyed "1" .. "K"; an embedding and an output matrix
    (`head`) of its own where `mtp.embedding` and `mtp.projection` say so."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__()
        self.projection = Affine(2 * model.hidden, model.hidden, std=model.init_std, group=group)
        self.block = nn.ModuleDict({str(r): PositionLayer(model, group) for r in range(1, mtp.blocks + 1)})
        self.embedding, self.head = own_embedding(model, mtp, group), own_projection(model, mtp, group)
        self.embedding_first = mtp.concat == "embedding_first"

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """h^{k-1} and Emb(t[i+k]) -> h^k, each [B, n, d]."""
        parts = (embedded, hidden) if self.embedding_first else (hidden, embedded)
        x = rms_norm(self.projection(torch.cat(parts, dim=-1)))
        for layer in self.block.values():
            x = layer(x)
        return x


class NotebookHeads(Heads):
    """D modules in a chain, or one D times. The inner width is `model.mlp`; only `mtp.h0` and `mtp.concat` have a say."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__(numbered(NotebookModule, model, mtp, group), mtp.depth)
        self.first_normed = mtp.h0 == "post_norm"

    def forward(self, trunk: TrunkStates, feed: Feed, turn: Tensor, mask: Mask) -> list[Tensor]:
        hidden, ready = trunk.after_norm if self.first_normed else trunk.before_norm, trunk.after_norm
        states = []
        for k, module in enumerate(self.asked(), start=1):
            hidden = ready = module(hidden, feed(k, ready))
            states.append(hidden)
        return states
