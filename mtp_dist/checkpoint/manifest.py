"""MANIFEST.json: what a checkpoint holds, the size and SHA-256 of every file, and the fragments that make each parameter.

A checkpoint is complete when its folder has its final name; the manifest is the last file written into it. MANIFEST.sha256
beside it holds the manifest's own sum, in the form of ``sha256sum``, so that no bit of a checkpoint can change unseen.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.fault import point
from mtp_dist.errors import UserError

FORMAT = "mtp_dist.checkpoint/2"
WITH_DRAFT_TOKENS = "mtp_dist.checkpoint/3"
"""The same with draft_tokens.json. Versions that know no such file would take its heads for those of other tokens, so they are to
refuse it; any other checkpoint they can still read."""
WITH_OWN_MATRICES = "mtp_dist.checkpoint/4"
"""The same with output matrices or embeddings in sequential or notebook heads. Versions that know no such heads would use the
trunk's."""
UNSUMMED = "mtp_dist.checkpoint/1"
"""The first format, which is still read: the same without MANIFEST.sha256."""
MANIFEST = "MANIFEST.json"
MANIFEST_SUM = "MANIFEST.sha256"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"


@dataclass
class FragmentRecord:
    """Elements [begin, end), in row-major order, of the box `start` .. `start + shape` of a parameter.

    They lie in `file` under `key` + "." + part, part one of ``parallel.engine.PARTS``, float32.
    """

    file: str
    key: str
    start: list[int]
    shape: list[int]
    begin: int
    end: int


@dataclass
class ParameterRecord:
    """Global shape and the fragments that together hold each element once. `moments`: whether they hold Adam's moments, too;
    those of a parameter that was saved frozen do not."""

    shape: list[int]
    fragments: list[FragmentRecord] = field(default_factory=list)
    moments: bool = True


@dataclass
class FileRecord:
    """Bytes and hexadecimal SHA-256."""

    size: int
    sha256: str


@dataclass
class Manifest:
    """`progress`: counters of the run; `contract`: what a decoder must know of the heads; `layout`: of the run that saved;
    `data`: state of the training stream; `tracker`: the id under which metrics go on."""

    step: int
    progress: dict[str, Any]
    optimizer: dict[str, Any]
    contract: dict[str, Any]
    layout: dict[str, Any]
    data: dict[str, Any]
    tracker: dict[str, Any]
    versions: dict[str, str]
    parameters: dict[str, ParameterRecord]
    files: dict[str, FileRecord]
    format: str = FORMAT

    def write(self, path: Path) -> None:
        """Write it, after its sum, and force both to the disk."""
        content = self.encode()
        total = path.with_name(MANIFEST_SUM)
        total.write_bytes(_sum_line(content))
        sync_path(total)
        point("manifest.before")
        path.write_bytes(content)
        sync_path(path)
        point("manifest.after")

    def encode(self) -> bytes:
        """JSON, a line for each key, parameter and file: thousands of fragments go through the encoder in one call a line."""
        lines = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("parameters", "files"):
                entries = [f"  {json.dumps(name)}: {json.dumps(asdict(entry))}" for name, entry in value.items()]
                lines.append(f" {json.dumps(item.name)}: {{\n" + ",\n".join(entries) + "\n }")
            else:
                lines.append(f" {json.dumps(item.name)}: {json.dumps(value)}")
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _sum_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


class DamagedError(UserError):
    """The content is proven to be other than what was written. Anything else that hinders reading may pass."""


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where the folder is no checkpoint or one of another format, DamagedError where it is a damaged one."""
    try:
        content = (folder / MANIFEST).read_bytes()
        summed = (folder / MANIFEST_SUM).read_bytes() if (folder / MANIFEST_SUM).exists() else None
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None
    if summed is not None and summed != _sum_line(content):
        raise DamagedError(f"{folder / MANIFEST} is damaged (its SHA-256 is not that of {MANIFEST_SUM}); use another checkpoint")
    try:
        raw = json.loads(content)
        if raw.get("format") not in (WITH_OWN_MATRICES, WITH_DRAFT_TOKENS, FORMAT, UNSUMMED):
            known = f"{WITH_OWN_MATRICES!r}, {WITH_DRAFT_TOKENS!r}, {FORMAT!r} and {UNSUMMED!r}"
            raise UserError(f"{folder} has checkpoint format {raw.get('format')!r}; this version reads {known}")
        if raw["format"] != UNSUMMED and summed is None:
            raise DamagedError(f"{folder} is damaged: it has no {MANIFEST_SUM}; use another checkpoint")
        raw["parameters"] = {
            name: ParameterRecord(
                entry["shape"], [FragmentRecord(**fragment) for fragment in entry["fragments"]], entry.get("moments", True)
            )
            for name, entry in raw["parameters"].items()
        }
        raw["files"] = {name: FileRecord(**entry) for name, entry in raw["files"].items()}
        return Manifest(**raw)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{folder / MANIFEST} is damaged ({type(error).__name__}: {str(error)[:80]}); use another checkpoint"
        ) from None


def file_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def damage(folder: Path, name: str, expected: FileRecord) -> str | None:
    """What is wrong with one file of a checkpoint, None if nothing is. Raises UserError where it is there and cannot be read."""
    try:
        found = file_record(folder / name)
    except FileNotFoundError as error:
        return f"{name}: {error.strerror}"
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read: {error.strerror}") from None
    if found.size != expected.size:
        return f"{name}: {found.size} bytes instead of {expected.size}"
    return None if found.sha256 == expected.sha256 else f"{name}: its SHA-256 is not the recorded one"


def sync_path(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
