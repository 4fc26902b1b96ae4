"""The header of a safetensors file, read strictly: names, types, shapes and places of its tensors, no values.

The format: 8 bytes with the header's length (little-endian), the header as JSON, then the values without gaps.
https://github.com/huggingface/safetensors#format
"""

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from mtp_dist.json_document import FormError, parsed, typed

LARGEST = 100_000_000
"""Of a header, in bytes: the library's own limit."""


@dataclass
class StoredTensor:
    """What a file says of one tensor; dtype as safetensors names it, offsets [begin, end) in bytes of the values."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]

    def __post_init__(self) -> None:
        if min(self.shape, default=0) < 0:
            raise ValueError(f"shape {self.shape}")
        if len(self.data_offsets) != 2 or not 0 <= self.data_offsets[0] <= self.data_offsets[1]:
            raise ValueError(f"data_offsets {self.data_offsets}")


def read_header(file: BinaryIO) -> dict[str, StoredTensor]:
    """Name -> tensor, of an open file. Raises FormError where it has no such header, or where the tensors do not follow on each
    other to the end of the file. Sizes of types are the library's to check, when it opens the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 0 < length <= min(size - 8, LARGEST):
        raise FormError(f"its header cannot have {length} bytes, as the file has {size}")
    raw = typed(parsed(file.read(length)), dict[str, Any], "the header")
    typed(raw.pop("__metadata__", {}), dict[str, str], "__metadata__")
    found = typed(raw, dict[str, StoredTensor])
    reached = 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1].data_offsets):
        begin, end = tensor.data_offsets
        if begin != reached:
            raise FormError(f"{name[:80]} begins at byte {begin} of the values; the one before it ends at {reached}")
        reached = end
    if reached != size - 8 - length:
        raise FormError(f"its tensors take {reached} bytes; it has {size - 8 - length}")
    return found
