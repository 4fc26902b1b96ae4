"""What one rank writes: a safetensors file of the fragments that it owns and its random state, laid out once for a run.

The data part of the file is one stretch of bytes, so a snapshot is a copy of every fragment to its place in one buffer in host
memory, made once and used again by every save. Bytes are hashed as they are written, then read back from the disk.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import hashlib
import json
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mtp_dist.checkpoint.fault import point
from mtp_dist.checkpoint.manifest import FileRecord, FragmentRecord, ParameterRecord, damage
from mtp_dist.model.parameter import spec_of
from mtp_dist.parallel.engine import Engine

Fragments = list[tuple[str, ParameterRecord]]
"""Parameter, and what this file holds of it: one fragment each."""
PIECE = 1 << 24
"""Bytes written and hashed in one call: few calls, and the disk is at work while the next piece is hashed."""
_TYPES = {torch.float32: "F32", torch.uint8: "U8"}


class FragmentFile:
    """The file `name` of this rank. `buffered`: make the snapshot's buffer now, so that a lack of memory shows at the start."""

    def __init__(self, name: str, engine: Engine, *, buffered: bool) -> None:
        self.name, self.engine = name, engine
        self.fragments = _placed(name, engine)
        header, at = {}, 0
        for key, value in self._tensors():
            header[key] = {"dtype": _TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
            at += value.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the data part is aligned, as its readers map it into memory
        self._header = struct.pack("<Q", len(encoded)) + encoded
        self._buffer: Tensor | None = None
        if buffered:
            # Filled, so that its pages are there before the first save and no save waits for them.
            self._buffer = torch.empty(at, dtype=torch.uint8).fill_(0)
            if engine.mesh.device.type == "cuda":
                _pin(self._buffer)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Key and flat values, in the order of the file: float32 first, as bytes of any number would break their alignment."""
        for (_, record), fragment in zip(self.fragments, self.engine.fragments(), strict=True):
            for part, value in fragment.parts.items():
                yield f"{record.fragments[0].key}.{part}", value.detach()
        device = self.engine.mesh.device
        if device.type == "cuda":  # by name: a thread has a current device of its own
            yield "rng.cuda", torch.cuda.get_rng_state(device)
        yield "rng.cpu", torch.get_rng_state()

    def snapshot(self) -> None:
        """Copy everything as it is now, so that training may go on. Returns when the copy is whole."""
        assert self._buffer is not None
        at = 0
        for number, (_, value) in enumerate(self._tensors()):
            self._buffer[at : at + value.nbytes].view(value.dtype).copy_(value, non_blocking=True)
            at += value.nbytes
            if number == 1:
                point("snapshot.middle")
        if self.engine.mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def write(self, folder: Path) -> FileRecord:
        """Write the snapshot, or without a buffer what is in the engine now; force it to the disk and read it back.

        Raises OSError, also where the disk gives back other bytes than it was given.
        """
        path, digest, size = folder / self.name, hashlib.sha256(), 0
        with path.open("wb", buffering=0) as file:
            for number, piece in enumerate(self._pieces()):
                left = piece
                while left:  # a write that fills the disk takes only a part, and the next one fails
                    left = left[file.write(left) :]
                digest.update(piece)
                size += len(piece)
                if number == 0:
                    point("write.middle")
            point("write.after")
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # else the check below reads this machine's memory, not the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        point("write.synced")
        record = FileRecord(size, digest.hexdigest())
        problem = damage(folder, self.name, record)
        if problem is not None:
            raise OSError(f"not what was written: {problem}")
        return record

    def _pieces(self) -> Iterator[memoryview]:
        yield memoryview(self._header)
        if self._buffer is not None:
            sources: Iterator[Tensor] = iter([self._buffer])
        else:
            sources = (value.cpu().contiguous().view(torch.uint8) for _, value in self._tensors())
        for source in sources:
            content = memoryview(source.numpy())  # type: ignore[arg-type]
            for begin in range(0, len(content), PIECE):
                yield content[begin : begin + PIECE]


def _pin(buffer: Tensor) -> None:
    """Make the device copy into this memory directly. Torch's own pinned memory comes in powers of two: up to twice as much."""
    runtime, place = torch.cuda.cudart(), buffer.data_ptr()
    torch.cuda.check_error(int(runtime.cudaHostRegister(place, buffer.nbytes, 1)))
    weakref.finalize(buffer, runtime.cudaHostUnregister, place)


def _placed(file: str, engine: Engine) -> Fragments:
    found = []
    for fragment in engine.fragments():
        spec = spec_of(engine.parameters[fragment.name])
        key = f"{fragment.name}@{'x'.join(map(str, spec.start))}+{fragment.begin}"
        place = FragmentRecord(file, key, list(spec.start), list(spec.local_shape), fragment.begin, fragment.end)
        found.append((fragment.name, ParameterRecord(list(spec.shape), [place], moments=len(fragment.parts) > 1)))
    return found
