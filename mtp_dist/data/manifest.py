"""dataset.json: what a dataset holds, held to what it says.

`dataset.sha256` beside it holds its sum, in the form of ``sha256sum``, so that no bit of it can change unseen. Every number that
follows from others is compared with them here; what follows from the files is compared where they are opened (`dataset.py`,
`reading.py`). Datasets of the first format have no sum; all other checks hold for them as well.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, parsed, typed
from mtp_dist.member_file import check_name, check_sha256
from mtp_dist.regular_file import MIB, read_regular

FORMAT = "mtp_dist.dataset/2"
UNSUMMED = "mtp_dist.dataset/1"
"""The first format, which is still read: the same without dataset.sha256."""
MANIFEST = "dataset.json"
MANIFEST_SUM = "dataset.sha256"
SPLITS = ("train", "validation")
LARGEST = 256 * MIB
"""Of a manifest; a shard takes about 400 bytes of it."""
RECORD = 512
"""A tar's size is a multiple of this."""


@dataclass
class ShardRecord:
    """Names relative to the dataset, sizes in bytes, sums in hexadecimal SHA-256."""

    file: str
    bytes: int
    sha256: str
    documents: int
    tokens: int
    index: str
    index_sha256: str

    def __post_init__(self) -> None:
        for name in (self.file, self.index):
            check_name(name)
        for value in (self.sha256, self.index_sha256):
            check_sha256(value)
        # Every document ends with a token, and takes two members of a header and a record each.
        if not 1 <= self.documents <= self.tokens:
            raise ValueError(f"{self.documents} documents with {self.tokens} tokens")
        if self.bytes % RECORD or self.bytes < 4 * RECORD * self.documents:
            raise ValueError(f"a tar of {self.documents} documents cannot be {self.bytes} bytes")


@dataclass
class SplitRecord:
    documents: int
    tokens: int
    shards: list[ShardRecord]

    def __post_init__(self) -> None:
        for name in ("documents", "tokens"):
            stated, total = getattr(self, name), sum(getattr(shard, name) for shard in self.shards)
            if stated != total:
                raise ValueError(f"{name} is {stated}, but its shards have {total}")


@dataclass
class TokenizerRecord:
    file: str
    sha256: str
    vocab_size: int
    eos_id: int
    eos_token: str

    def __post_init__(self) -> None:
        check_name(self.file)
        check_sha256(self.sha256)
        if not 0 <= self.eos_id < self.vocab_size <= 2**31:
            raise ValueError(f"eos_id {self.eos_id} of {self.vocab_size} tokens")


@dataclass
class CountsRecord:
    file: str
    sha256: str

    def __post_init__(self) -> None:
        check_name(self.file)
        check_sha256(self.sha256)


@dataclass
class Manifest:
    """The content of dataset.json; `token_counts` came after the first datasets."""

    format: str
    tokenizer: TokenizerRecord
    dtype: str
    splits: dict[str, SplitRecord]
    settings: dict[str, Any]
    settings_sha256: str
    token_counts: CountsRecord | None = None

    def __post_init__(self) -> None:
        if self.dtype != token_dtype(self.tokenizer.vocab_size):
            raise ValueError(f"dtype is {self.dtype!r}, but {self.tokenizer.vocab_size} tokens are stored otherwise")
        if sorted(self.splits) != sorted(SPLITS):
            raise ValueError(f"splits are {sorted(self.splits)}, not {sorted(SPLITS)}")
        for split, record in self.splits.items():
            _check_shards(split, record.shards)
        sums = [shard.sha256 for record in self.splits.values() for shard in record.shards]
        if len(set(sums)) < len(sums):
            raise ValueError("two shards have the same sha256")
        if self.settings_sha256 != settings_hash(self.settings):
            raise ValueError("settings_sha256 is not that of its settings")


def _check_shards(split: str, shards: list[ShardRecord]) -> None:
    """Shards stand in the order in which they were written, each once: their names say which one each is."""
    for number, shard in enumerate(shards):
        file, index = shard_names(split, number)
        if (shard.file, shard.index) != (file, index):
            raise ValueError(f"shard {number} of {split} is {shard.file} with {shard.index}, not {file} with {index}")


def shard_names(split: str, number: int) -> tuple[str, str]:
    """Of a tar and of its index, relative to the dataset."""
    stem = f"{split}/{split}-{number:06d}"
    return f"{stem}.tar", f"{stem}.index.npz"


def sample_key(split: str, number: int) -> str:
    """Of a document, by its number in the split; without a dot, as webdataset takes an extension from the first one on."""
    return f"{split}-{number:09d}"


def token_dtype(vocab_size: int) -> str:
    """numpy's name of the narrowest unsigned type that holds every token number. (No numpy here: a launcher reads manifests.)"""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def settings_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Its sum first: a folder that has a dataset.json is complete."""
    entries = {name: value for name, value in asdict(manifest).items() if value is not None}
    content = (json.dumps(entries, indent=1) + "\n").encode()
    (folder / MANIFEST_SUM).write_bytes(_sum_line(content))
    (folder / MANIFEST).write_bytes(content)


def read_manifest(folder: Path) -> Manifest:
    """The content of a folder's dataset.json; raises UserError where there is none of this format, or a damaged one."""
    file = folder / MANIFEST
    try:
        content = read_regular(file, LARGEST)
        total = read_regular(folder / MANIFEST_SUM, 1024) if (folder / MANIFEST_SUM).exists() else None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a dataset (no {MANIFEST}); build one: python data/build_shards.py source=python_stdlib out={folder}"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if total is not None and total != _sum_line(content):
        raise damaged(folder, f"its SHA-256 is not that of {MANIFEST_SUM}")
    try:
        raw = parsed(content)
        found = typed(raw, dict[str, Any]).get("format")
        if found not in (FORMAT, UNSUMMED):
            raise UserError(f"{file} has format {str(found)[:40]!r}, this version reads {FORMAT!r}; build the dataset again")
        if found == FORMAT and total is None:
            raise damaged(folder, f"{MANIFEST_SUM} is missing")
        return typed(raw, Manifest)
    except FormError as error:
        raise damaged(folder, str(error)) from None


def damaged(folder: Path, what: str) -> UserError:
    return UserError(f"{folder / MANIFEST} is damaged ({what}); restore it or build the dataset again")


def _sum_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()
