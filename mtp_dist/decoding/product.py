"""Matrix products with weights laid out once as the processor's bfloat16 kernels read them.

torch reorders such a weight in each product; where a pass over a few tokens reads it once, that costs as much as the product.
Measured on one core in bfloat16, one row: 105 µs against 262 for an output matrix of 4096 x 192, 29 against 47 for a projection
of 576 x 192. The kernel is oneDNN's behind torch's own operator, for which ``torch.compile`` packs weights too; the sums are the
same ones, in float32. Other dtypes and devices need no packing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.decoding.replacement import replace
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.linear import Linear
from mtp_dist.model.output import OwnProjection

_PACKED = "packed_product"


class Product:
    """x [.., inputs] -> x Wᵀ + b [.., outputs], for a W [outputs, inputs] that no longer changes. Its memory is its own where it
    is packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = packable(weight)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return found
        return F.linear(x, self.weight, self.bias)


def packable(weight: Tensor) -> bool:
    """Whether there is a kernel for it here."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """Stands for a ``Linear`` of a model in one process, in decoding: the same outputs."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.product = Product(linear.weight, getattr(linear, "bias", None))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., inputs] -> [.., outputs]."""
        return self.product(x)


def packed(rows: Tensor) -> Product | None:
    """The product with a vocabulary matrix, or with those of its rows that a tensor of drafted tokens names, if ``pack`` has met
    it."""
    return getattr(rows, _PACKED, None)


def pack(model: Chunk) -> None:
    """Replace every ``Linear`` below ``model`` for which there is a kernel. Vocabulary matrices stay, as others read
    them too, and are held twice."""
    replace(model, Linear, lambda linear: PackedLinear(linear) if packable(linear.weight) else linear)
    own = [module.weight for module in model.modules() if isinstance(module, OwnProjection)]
    for matrix in (model.output_weight(), *own):
        if packable(matrix):
            setattr(matrix, _PACKED, Product(matrix))
    known = model.drafted_tokens()
    if known is not None and packable(model.output_weight()):
        setattr(known.tokens, _PACKED, Product(model.output_weight()[known.tokens]))
