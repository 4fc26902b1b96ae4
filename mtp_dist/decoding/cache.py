"""Preallocated key/value caches of attention layers, and the window of states that a lagging MTP module still has to read.

All rows of a batch are equally long. Rolling back is free: entries behind the length stay in memory until they are overwritten.
"""

import torch
from torch import Tensor


class KeyValues:
    """Keys and values of one attention layer, [B, K, capacity, c] each. It is the model's ``KeyValueCache``."""

    def __init__(self, batch: int, heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.keys, self.values = (torch.empty(batch, heads, capacity, head_dim, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, K, n, c]; returns views of all keys and values [B, K, total, c]. Raises IndexError beyond the capacity."""
        end = self.length + key.shape[2]
        if end > self.keys.shape[2]:
            raise IndexError(f"{end} positions do not fit a cache of {self.keys.shape[2]}")
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def crop(self, length: int) -> None:
        """Forget every entry from position ``length`` on; a shorter cache stays as it is."""
        self.length = min(self.length, max(length, 0))


class Window:
    """States [B, n, d] of the consecutive positions ``start`` .. ``end`` - 1: written at the end, forgotten from both sides."""

    def __init__(self, batch: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.states = torch.empty(batch, 0, width, dtype=dtype, device=device)
        self.start = 0

    @property
    def end(self) -> int:
        return self.start + self.states.shape[1]

    def append(self, states: Tensor) -> None:
        """Add [B, n, d] as positions ``end`` .. ``end`` + n - 1."""
        self.states = torch.cat((self.states, states), dim=1)

    def crop(self, end: int) -> None:
        """Forget positions from ``end`` on."""
        self.states = self.states[:, : max(end - self.start, 0)]

    def forget(self, before: int) -> None:
        """Forget positions before ``before``."""
        gone = min(max(before - self.start, 0), self.states.shape[1])
        self.states, self.start = self.states[:, gone:], self.start + gone

    def since(self, position: int) -> Tensor:
        """[B, end - position, d]: states from ``position`` on. IndexError for one that is forgotten."""
        if position < self.start:
            raise IndexError(f"position {position} is forgotten; the window starts at {self.start}")
        return self.states[:, position - self.start :]
