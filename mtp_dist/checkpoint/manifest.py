"""MANIFEST.json: what a checkpoint holds, the size and SHA-256 of every file, and the fragments that make each parameter.

A checkpoint is complete when its folder has its final name; the manifest is the last file written into it. MANIFEST.sha256
beside it holds the manifest's own sum, in the form of ``sha256sum``, so that no bit of a checkpoint can change unseen.
"""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.fault import point
from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, parsed, typed
from mtp_dist.member_file import check_name, check_sha256, member_sha256, sha256_of
from mtp_dist.regular_file import MIB, open_regular, read_regular

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
DRAFT_TOKENS = "draft_tokens.json"
LARGEST = 512 * MIB
"""Of a manifest; a fragment takes about 200 bytes of it."""
VALUE_BYTES = 4
"""Of an element of a fragment: they are float32."""


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

    def __post_init__(self) -> None:
        _plain(self.file)
        if len(self.start) != len(self.shape) or min(self.start, default=0) < 0 or min(self.shape, default=1) < 1:
            raise ValueError(f"a box cannot begin at {self.start} with shape {self.shape}")
        if not 0 <= self.begin <= self.end <= math.prod(self.shape):
            raise ValueError(f"elements {self.begin} to {self.end} of a box of shape {self.shape}")


@dataclass
class ParameterRecord:
    """Global shape and the fragments that together hold each element once. `moments`: whether they hold Adam's moments, too;
    those of a parameter that was saved frozen do not."""

    shape: list[int]
    fragments: list[FragmentRecord] = field(default_factory=list)
    moments: bool = True

    def boxes(self) -> dict[tuple[tuple[int, ...], tuple[int, ...]], list[FragmentRecord]]:
        """(start, shape) -> its fragments, both in ascending order."""
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[FragmentRecord]] = {}
        for fragment in sorted(self.fragments, key=lambda f: (f.start, f.shape, f.begin)):
            found.setdefault((tuple(fragment.start), tuple(fragment.shape)), []).append(fragment)
        return found


@dataclass
class FileRecord:
    """Bytes and hexadecimal SHA-256."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        check_sha256(self.sha256)
        if self.size < 0:
            raise ValueError(f"size is {self.size}")


@dataclass
class OptimizerRecord:
    """`step`: updates applied; `steps`: of trunk and heads, which the first versions did not tell apart."""

    kind: str
    step: int
    steps: dict[str, int] | None = None


@dataclass
class TrackerRecord:
    run_id: str


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


def require_complete(manifest: Manifest) -> None:
    """Raise FormError unless every file is listed, under a plain name, and the fragments of each parameter hold each of its
    elements once, in files large enough for them. What is loaded is then what was hashed, and no more than there is on disk."""
    try:
        listed = manifest.files
        for name in listed:
            _plain(name)
        for name in (CONFIG, TOKENIZER, *([DRAFT_TOKENS] if manifest.format == WITH_DRAFT_TOKENS else [])):
            if name not in listed:
                raise ValueError(f"files does not list {name}")
        taken: Counter[str] = Counter()
        for name, record in manifest.parameters.items():
            try:
                _require_whole(record)
            except ValueError as error:
                raise ValueError(f"parameters.{name[:80]}: {error}") from None
            parts = 3 if record.moments else 1
            for fragment in record.fragments:
                taken[fragment.file] += parts * VALUE_BYTES * (fragment.end - fragment.begin)
        for file, size in taken.items():
            if file not in listed:
                raise ValueError(f"files does not list {file}")
            if size > listed[file].size:
                raise ValueError(f"{file} is {listed[file].size} bytes; its fragments take {size}")
    except ValueError as error:
        raise FormError(str(error)) from None


def _require_whole(record: ParameterRecord) -> None:
    """The boxes of a parameter are slices of one dimension, in order and without a gap (a whole parameter is one box), and the
    fragments of each box follow on each other."""
    whole, boxes = tuple(record.shape), record.boxes()
    if not whole or min(whole) < 1:
        raise ValueError(f"shape {record.shape}")
    split, reached = 0, 0
    if len(boxes) > 1:
        # The dimension in which they differ; where they differ in several, the check below fails for one of them.
        (first, _), *_, (last, _) = boxes
        split = next((axis for axis, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    for (start, shape), fragments in boxes.items():
        expected = tuple(reached if axis == split else 0 for axis in range(len(whole)))
        across = [size for axis, size in enumerate(shape) if axis != split]
        if start != expected or across != [size for axis, size in enumerate(whole) if axis != split]:
            raise ValueError(f"a box at {list(start)} of shape {list(shape)} does not continue the one before it")
        reached += shape[split]
        position = 0
        for fragment in fragments:
            if fragment.begin != position:
                raise ValueError(f"elements {position} to {fragment.begin} of the box at {list(start)} are held by none or twice")
            position = fragment.end
        if position != math.prod(shape):
            raise ValueError(f"elements {position} to {math.prod(shape)} of the box at {list(start)} are held by none")
    if reached != whole[split]:
        raise ValueError(f"its fragments hold {reached} of {whole[split]} in dimension {split}")


def _plain(name: str) -> None:
    """A checkpoint has no folders, so a file's name is one part. Raises ValueError."""
    if "/" in check_name(name):
        raise ValueError(f"{name[:80]!r} is not the name of a file inside the folder")


def _sum_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


class DamagedError(UserError):
    """The content is proven to be other than what was written. Anything else that hinders reading may pass."""


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where the folder is no checkpoint or one of another format, DamagedError where it is a damaged one."""
    try:
        content = _read(folder / MANIFEST, LARGEST)
        summed = _read(folder / MANIFEST_SUM, 1024) if (folder / MANIFEST_SUM).exists() else None
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None
    if summed is not None and summed != _sum_line(content):
        raise damaged(folder, f"its SHA-256 is not that of {MANIFEST_SUM}")
    try:
        raw = typed(parsed(content), dict[str, Any])
        found = raw.get("format")
        if found not in (WITH_OWN_MATRICES, WITH_DRAFT_TOKENS, FORMAT, UNSUMMED):
            known = f"{WITH_OWN_MATRICES!r}, {WITH_DRAFT_TOKENS!r}, {FORMAT!r} and {UNSUMMED!r}"
            raise UserError(f"{folder} has checkpoint format {str(found)[:40]!r}; this version reads {known}")
        if found != UNSUMMED and summed is None:
            raise DamagedError(f"{folder} is damaged: it has no {MANIFEST_SUM}; use another checkpoint")
        manifest = typed(raw, Manifest)
        require_complete(manifest)
    except FormError as error:
        raise damaged(folder, str(error)) from None
    return manifest


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_regular(path, limit)
    except UserError as error:
        raise DamagedError(f"{error}, or use another checkpoint") from None


def damaged(folder: Path, what: str) -> DamagedError:
    """The error of a manifest that cannot be what was written."""
    return DamagedError(f"{folder / MANIFEST} is damaged ({what}); use another checkpoint")


def file_record(path: Path) -> FileRecord:
    """Raises UserError where it is no regular file, OSError where it cannot be read."""
    with open_regular(path) as file:
        return FileRecord(os.fstat(file.fileno()).st_size, sha256_of(file))


def damage(folder: Path, name: str, expected: FileRecord) -> str | None:
    """What is wrong with one file of a checkpoint, None if nothing is. Raises UserError where it is there and cannot be read."""
    try:
        size, sha256 = member_sha256(folder, name, expected.size)
    except FileNotFoundError as error:
        return f"{name}: {error.strerror}"
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read: {error.strerror}") from None
    except UserError as error:  # something else lies there, or a link out of the folder
        return str(error)
    if size != expected.size:
        return f"{name}: {size} bytes instead of {expected.size}"
    return None if sha256 == expected.sha256 else f"{name}: its SHA-256 is not the recorded one"


def sync_path(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
