"""A dataset: a folder of tokenised documents, described by its dataset.json.

`dataset.json` is written last and by a rename, so a folder that holds one is complete. docs/data-format.md describes the format.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mtp_dist.data.manifest import Manifest, ShardRecord, SplitRecord, damaged, read_manifest, sample_key
from mtp_dist.data.tokenizer import load_tokenizer, vocabulary_size
from mtp_dist.errors import UserError
from mtp_dist.member_file import member_sha256, open_member, sha256_of
from mtp_dist.regular_file import open_regular


@dataclass(frozen=True)
class Encoding:
    """How documents are stored: the numpy `dtype` of their tokens, which are below `vocab_size` and end with `eos_id`."""

    dtype: str
    vocab_size: int
    eos_id: int


@dataclass(frozen=True)
class Shard:
    """One tar and its index, in the dataset's `folder`; sizes in bytes, sums in hexadecimal SHA-256. `first`: number of its
    first document in `split`."""

    folder: Path
    record: ShardRecord
    split: str
    first: int
    encoding: Encoding

    @property
    def path(self) -> Path:
        return self.folder / self.record.file

    @property
    def index_path(self) -> Path:
        return self.folder / self.record.index

    @property
    def bytes(self) -> int:
        return self.record.bytes

    @property
    def sha256(self) -> str:
        return self.record.sha256

    @property
    def documents(self) -> int:
        return self.record.documents

    @property
    def tokens(self) -> int:
        return self.record.tokens

    def key(self, number: int) -> str:
        """Of its number-th document."""
        return sample_key(self.split, self.first + number)


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
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> "Dataset":
        """Read `path`/dataset.json, compare what it says with its tokenizer, and check that its files are there, with the right
        sizes.

        Raises UserError where the folder is no dataset, or a file of it is missing, cut, or not the one that was built.
        """
        path = Path(path)
        manifest = read_manifest(path)
        tokenizer = manifest.tokenizer
        encoding = Encoding(manifest.dtype, tokenizer.vocab_size, tokenizer.eos_id)
        dataset = cls(
            path=path,
            tokenizer_path=path / tokenizer.file,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            eos_token=tokenizer.eos_token,
            splits={name: _split(path, name, record, encoding) for name, record in manifest.splits.items()},
            manifest=manifest,
        )
        dataset._check_tokenizer()
        for split in dataset.splits.values():
            for shard in split.shards:
                _check_shard(shard)
        return dataset

    @property
    def given_tokenizer_sha256(self) -> str | None:
        """Of the file that `tokenizer.path` named when the shards were built; the copy kept here may be formatted differently."""
        given = self.manifest.settings.get("tokenizer")
        return given.get("sha256") if isinstance(given, dict) else None

    def split(self, name: str) -> Split:
        """The named split; raises UserError where there is none or it is empty."""
        split = self.splits.get(name)
        if split is None or not split.documents:
            raise UserError(
                f"dataset {self.path} has no documents in split {name!r}; "
                "build it from more documents, or with another validation_share"
            )
        return split

    def _check_tokenizer(self) -> None:
        file = self.tokenizer_path
        try:
            total = member_sha256(self.path, file.name)[1]
        except FileNotFoundError:
            raise UserError(f"dataset {self.path} lacks {file.name}; build it again") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        if total != self.tokenizer_sha256:
            raise UserError(f"{file} is not the tokenizer that made these shards (SHA-256 differs); restore it")
        tokenizer = load_tokenizer(file)
        if (rows := vocabulary_size(tokenizer)) != self.vocab_size:
            raise damaged(self.path, f"vocab_size is {self.vocab_size}, but {file.name} has {rows} tokens")
        if (number := tokenizer.token_to_id(self.eos_token)) != self.eos_id:
            raise damaged(self.path, f"eos_id is {self.eos_id}, but {self.eos_token!r} is {number} in {file.name}")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a regular file. Raises UserError where it is none, OSError where it cannot be read."""
    with open_regular(path) as file:
        return sha256_of(file)


def _split(path: Path, name: str, record: SplitRecord, encoding: Encoding) -> Split:
    shards: list[Shard] = []
    first = 0
    for shard in record.shards:
        shards.append(Shard(path, shard, name, first, encoding))
        first += shard.documents
    return Split(name, record.documents, record.tokens, tuple(shards))


def _check_shard(shard: Shard) -> None:
    try:
        with open_member(shard.folder, shard.record.file) as file:
            size = file.seek(0, 2)
        if size != shard.bytes:
            raise UserError(f"shard {shard.path} is {size} bytes; expected {shard.bytes}; restore it or build the dataset again")
        open_member(shard.folder, shard.record.index).close()
    except FileNotFoundError as error:
        index = f"index {shard.index_path} of shard {shard.path.name}"
        what = index if error.filename == str(shard.index_path) else f"shard {shard.path}"
        raise UserError(f"{what} is missing; restore it or build the dataset again") from None
    except OSError as error:
        raise UserError(f"{error.filename or shard.path} cannot be read: {error.strerror}") from None
