"""The trunk's parts: RMSNorm, rotary positions, grouped-query attention, SwiGLU, and the block made of them (Llama's
arrangement).

Shapes: B rows, S positions, d hidden width, H query heads, K key/value heads, c head width. Under tensor parallelism H, K and the
feed-forward width are this rank's share; with more ranks than key/value heads K is 1, and neighbours hold the same head.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.config.layout import key_value_sharers
from mtp_dist.config.schema import ModelConfig
from mtp_dist.model.attention import Mask, attend
from mtp_dist.model.linear import Linear
from mtp_dist.model.parameter import parameter
from mtp_dist.model.tensor_group import ALONE, TensorGroup


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, hidden: int, eps: float, group: TensorGroup) -> None:
        super().__init__()
        self.weight = parameter((hidden,), split=None, std=None, group=group)
        self.eps = eps

    def forward(self, x: Tensor, *, learn: bool = True) -> Tensor:
        """learn=False: the weight gets no gradient."""
        return F.rms_norm(x, self.weight.shape, self.weight if learn else self.weight.detach(), self.eps)


class KeyValueCache(Protocol):
    """Where a decoder keeps one attention layer's keys and values."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, K, n, c] at the end; returns all keys and values [B, K, total, c]."""
        ...


def rotation(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """What turns a pair, by the rotary embedding (arXiv 2104.09864, half-split pairs as in Llama's released code): the cosine,
    and the sine as each half takes it from the other, -sin the first and sin the second.

    positions int64 [.., n] -> float32 [2, .., n, head_dim].
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions.unsqueeze(-1).float() * frequency
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Apply ``rotation`` [2, n, c] (or [2, B, 1, n, c]) to x [B, H, n, c], in float32, returned in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * turn[0] + wide.roll(x.shape[-1] // 2, -1) * turn[1]).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245). `inputs`: width of what it reads, where that is not the hidden width d."""

    def __init__(self, config: ModelConfig, group: TensorGroup = ALONE, *, inputs: int | None = None) -> None:
        super().__init__()
        assert config.head_dim is not None
        d, c, std = config.hidden, config.head_dim, config.init_std
        self.head_dim, self.group = c, group
        self.query = Linear(inputs or d, config.heads * c, std=std, group=group, split=0)
        sharers = key_value_sharers(config, group.size)
        self.key = Linear(inputs or d, config.kv_heads * c, std=std, group=group, split=0, sharers=sharers)
        self.value = Linear(inputs or d, config.kv_heads * c, std=std, group=group, split=0, sharers=sharers)
        self.output = Linear(config.heads * c, d, std=std * (2 * config.layers) ** -0.5, group=group, split=1)

    def forward(self, x: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache | None = None) -> Tensor:
        """x [B, n, inputs] (a share of the positions under sequence parallelism) -> [B, n, d]. mask: a tensor is broadcast to
        [B, H, n, total]; None is plainly causal, or with a cache: every new position sees everything."""
        query, key, value = self.project(x)
        query, key = rotate(query, turn), rotate(key, turn)
        if cache is not None:
            key, value = cache.extend(key, value)
        attended = attend(query, key, value, mask, causal=cache is None)
        return self.output(attended.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, n, inputs] -> query [B, H, n, c], key and value [B, K, n, c], not yet rotated."""
        x = self.group.enter(x)
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return query, key, value


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, group: TensorGroup = ALONE) -> None:
        super().__init__()
        d, f, std = config.hidden, config.mlp, config.init_std
        self.group = group
        self.gate = Linear(d, f, std=std, group=group, split=0)
        self.up = Linear(d, f, std=std, group=group, split=0)
        self.down = Linear(f, d, std=std * (2 * config.layers) ** -0.5, group=group, split=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group.enter(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm decoder layer. [B, n, d] -> [B, n, d]."""

    def __init__(self, config: ModelConfig, group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps, group)
        self.attention = Attention(config, group)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps, group)
        self.mlp = FeedForward(config, group)

    def forward(self, x: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, mask, cache)
        return x + self.mlp(self.mlp_norm(x))
