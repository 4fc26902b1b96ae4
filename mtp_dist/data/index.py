"""The sidecar index of a shard: where each sample lies in the tar, how long it is, and a checksum.

webdataset reads a tar from its beginning and cannot tell a damaged one from a short one: a broken header ends it
silently, a flipped byte passes. The index gives random access (members are 512-aligned, so any range of whole samples is
again a tar) and lets the reader prove that it got every byte of every sample.
"""

import io
import tarfile
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from zlib import crc32

import numpy as np
from webdataset.tariterators import base_plus_ext

TOKENS = "tokens.npy"  # extension of the member that holds a document's tokens
RECORD = 512  # tar members are padded to this


_TYPES = {"keys": np.bytes_, "offsets": np.int64, "sizes": np.int64, "checksums": np.uint32, "tokens": np.int64}


@dataclass(frozen=True)
class ShardIndex:
    """One entry a sample, in stored order.

    `keys` bytes; `offsets`, `sizes` int64, the byte range of the sample's members in the tar, headers and padding included;
    `checksums` uint32, CRC-32 of that range; `tokens` int64, tokens of the document.
    """

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, path: Path) -> None:
        """The same index gives the same bytes."""
        with path.open("wb") as file:
            np.savez(file, **{item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, data: bytes) -> "ShardIndex":
        """Raises ValueError, KeyError, OSError or zipfile.BadZipFile where `data` is not an index of one entry or more, whose
        samples lie end to end from the beginning of their tar on."""
        # Stored, as `save` writes it: what is unpacked cannot be larger than `data`.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            index = cls(**{item.name: arrays[item.name] for item in fields(cls)})
        for name, kind in _TYPES.items():
            values = getattr(index, name)
            if values.shape != (len(index.offsets),) or not len(values) or not np.issubdtype(values.dtype, kind):
                raise ValueError(f"{name} is {values.dtype} {list(values.shape)}")
        ends = index.offsets + index.sizes
        aligned = not (index.sizes % RECORD).any() and (index.sizes >= RECORD).all()
        if not aligned or index.offsets[0] != 0 or (index.offsets[1:] != ends[:-1]).any() or (index.tokens < 1).any():
            raise ValueError("its samples do not lie end to end")
        return index

    @classmethod
    def scan(cls, path: Path) -> "ShardIndex":
        """Make the index by reading a tar; consecutive members that share a key are one sample, as in webdataset.

        Raises ValueError where a key comes back after another one, or a sample has no tokens.
        """
        current = None
        starts: dict[str, int] = {}
        ends: dict[str, int] = {}
        tokens: dict[str, int] = {}
        with path.open("rb") as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, extension = base_plus_ext(member.name)
                    if key is None or (key != current and key in starts):
                        raise ValueError(f"{path}: member {member.name} does not belong to one sample")
                    current = key
                    starts.setdefault(key, member.offset)
                    ends[key] = member.offset_data + -(-member.size // RECORD) * RECORD
                    if extension == TOKENS:
                        payload = tar.extractfile(member)
                        assert payload is not None
                        tokens[key] = np.lib.format.read_array(io.BytesIO(payload.read())).size
            checksums = []
            for key, start in starts.items():
                file.seek(start)
                checksums.append(crc32(file.read(ends[key] - start)))
        if lacking := [key for key in starts if key not in tokens]:
            raise ValueError(f"{path}: sample {lacking[0]} has no {TOKENS}")
        offsets = np.array(list(starts.values()), dtype=np.int64)
        return cls(
            keys=np.array([key.encode() for key in starts], dtype=np.bytes_),
            offsets=offsets,
            sizes=np.array(list(ends.values()), dtype=np.int64) - offsets,
            checksums=np.array(checksums, dtype=np.uint32),
            tokens=np.array([tokens[key] for key in starts], dtype=np.int64),
        )
