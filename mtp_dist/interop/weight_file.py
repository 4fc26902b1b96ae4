"""A safetensors file written tensor by tensor: memory holds one of them, where the library's writer wants all of a file at once.

The format: 8 bytes with the header's length (little-endian), the header as JSON (dtype, shape and place of every tensor), then
the values without gaps. https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {"float32": 4, "bfloat16": 2}
_NAMES = {"float32": "F32", "bfloat16": "BF16"}
ALIGNMENT = 8
"""The values begin at a multiple of this, in bytes."""


class Description(NamedTuple):
    """A tensor to come. dtype: a key of ``SIZES``."""

    name: str
    shape: list[int]
    dtype: str

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * SIZES[self.dtype]


def write(path: Path, tensors: list[Description], values: "Iterable[Tensor]") -> None:
    """``values``: of each tensor, in this order, taken one at a time. Raises ValueError where one is not as described, OSError
    where the file cannot be written."""
    with path.open("wb") as file:
        file.write(_header(tensors))
        for described, tensor in zip(tensors, values, strict=True):
            found = Description(described.name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            if found != described:
                raise ValueError(f"{found} was to be {described}")
            file.write(_bytes(tensor))


def _header(tensors: list[Description]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape, dtype in tensors:
        end = begin + Description(name, shape, dtype).size
        content[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: "Tensor") -> memoryview:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
