"""Weights of 8 bits for decoding that waits for memory: half the bytes of bfloat16 are read a token.

W ≈ diag(s) Q with Q int8 [outputs, inputs], one scale s an output: s = max|row| / 127. Activations stay as they are. The product
is torch's own (``_weight_int8pack_mm``). This changes the model a little; what is lossless is lossless against the changed model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.decoding.replacement import replace
from mtp_dist.model.linear import Linear

NARROW = 32
"""Rows up to which torch's kernel reads int8 itself; wider passes are bound by arithmetic, and converting Q first is faster."""


class Int8Linear(nn.Module):
    """Stands for a ``Linear`` without its own gradient: the same outputs up to rounding."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        wide = weight.float()
        scale = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("quantized", (wide / scale.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))
        bias = getattr(linear, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.group, self.split = linear.group, linear.split
        self.quantized: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x [.., inputs] -> [.., outputs]."""
        rows = x.flatten(0, -2)
        if len(rows) <= NARROW and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows.contiguous(), self.quantized, self.scale)
        else:
            y = F.linear(rows, self.quantized.to(x.dtype)) * self.scale
        y = y.unflatten(0, x.shape[:-1])
        if self.split == 1:
            y = self.group.leave(y)
        return y if self.bias is None else y + self.bias


def quantize(model: nn.Module) -> None:
    """Replace every ``Linear`` below ``model``. Embedding, output matrix and norms stay."""
    replace(model, Linear, Int8Linear)
