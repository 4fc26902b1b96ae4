"""A dataset: a folder of tokenised documents, described by its dataset.json.

`dataset.json` is written last and by a rename, so a folder that holds one is complete. docs/data-format.md describes the format.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_dist.errors import UserError

FORMAT = "mtp_dist.dataset/1"
MANIFEST = "dataset.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Shard:
    """One tar and its index; sizes in bytes, sums in hexadecimal SHA-256."""

    path: Path
    bytes: int
    sha256: str
    documents: int
    tokens: int
    index_path: Path
    index_sha256: str


@dataclass(frozen=True)
class Split:
    """The documents of one split, in stored order over its shards."""

    name: str
    documents: int
    tokens: int
    shards: tuple[Shard, ...]

    @property
    def fingerprint(self) -> str:
        """Identity of the content: equal for equal bytes, wherever they lie."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Dataset:
    """A complete dataset folder."""

    path: Path
    tokenizer_path: Path
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    eos_token: str
    splits: Mapping[str, Split]
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "Dataset":
        """Read `path`/dataset.json and check that its files are there, with the right sizes.

        Raises UserError where the folder is no dataset, or a file of it is missing, cut, or not the one that was built.
        """
        path = Path(path)
        manifest = read_manifest(path)
        try:
            dataset = cls._described(path, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from error
        dataset._check_files()
        return dataset

    @classmethod
    def _described(cls, path: Path, manifest: Mapping[str, Any]) -> "Dataset":
        tokenizer = manifest["tokenizer"]
        return cls(
            path=path,
            tokenizer_path=path / tokenizer["file"],
            tokenizer_sha256=tokenizer["sha256"],
            vocab_size=tokenizer["vocab_size"],
            eos_id=tokenizer["eos_id"],
            eos_token=tokenizer["eos_token"],
            splits={name: _split(path, name, value) for name, value in manifest["splits"].items()},
            manifest=manifest,
        )

    def split(self, name: str) -> Split:
        """The named split; raises UserError where there is none or it is empty."""
        split = self.splits.get(name)
        if split is None or not split.documents:
            raise UserError(
                f"dataset {self.path} has no documents in split {name!r}; "
                "build it from more documents, or with another validation_share"
            )
        return split

    def _check_files(self) -> None:
        if not self.tokenizer_path.is_file():
            raise UserError(f"dataset {self.path} lacks {self.tokenizer_path.name}; build it again")
        if file_sha256(self.tokenizer_path) != self.tokenizer_sha256:
            raise UserError(f"{self.tokenizer_path} is not the tokenizer that made these shards (SHA-256 differs); restore it")
        for split in self.splits.values():
            for shard in split.shards:
                _check_shard(shard)


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of a folder's dataset.json; raises UserError where there is none of this format."""
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{path} is not a dataset (no {MANIFEST}); build one: python data/build_shards.py source=python_stdlib out={path}"
        )
    try:
        manifest = json.loads(file.read_bytes())
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if found != FORMAT:
        raise UserError(f"{file} has format {found!r}, this version reads {FORMAT!r}; build the dataset again")
    return manifest


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path / MANIFEST} is damaged ({type(error).__name__}: {error}); restore it or build the dataset again")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(path: Path, name: str, value: Mapping[str, Any]) -> Split:
    shards = tuple(
        Shard(
            path=path / shard["file"],
            bytes=shard["bytes"],
            sha256=shard["sha256"],
            documents=shard["documents"],
            tokens=shard["tokens"],
            index_path=path / shard["index"],
            index_sha256=shard["index_sha256"],
        )
        for shard in value["shards"]
    )
    return Split(name, value["documents"], value["tokens"], shards)


def _check_shard(shard: Shard) -> None:
    if not shard.path.is_file():
        raise UserError(f"shard {shard.path} is missing; restore it or build the dataset again")
    if (size := shard.path.stat().st_size) != shard.bytes:
        raise UserError(f"shard {shard.path} has {size} bytes for {shard.bytes}; restore it or build the dataset again")
    if not shard.index_path.is_file():
        raise UserError(f"index {shard.index_path} of shard {shard.path.name} is missing; restore it or build the dataset again")
