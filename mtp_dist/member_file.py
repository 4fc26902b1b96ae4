"""Files that a manifest names: inside its folder, or refused.

Manifests come with checkpoints and datasets that others made. A name in one must not lead anywhere else: no absolute path, no
`..`, no link out of the folder.
"""

import hashlib
import os
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

from mtp_dist.errors import UserError
from mtp_dist.regular_file import open_regular


def check_name(name: str) -> str:
    """A relative path of plain parts, with `/` between them. Raises ValueError for any other."""
    plain = name.isprintable() and "\\" not in name and all(part not in ("", ".", "..") for part in name.split("/"))
    if not plain or len(name) > 1024:
        raise ValueError(f"{name[:80]!r} is not the name of a file inside the folder")
    return name


def check_sha256(value: str) -> str:
    """64 hexadecimal digits in lower case. Raises ValueError for any other text."""
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{value[:80]!r} is not a hexadecimal SHA-256")
    return value


def open_member(folder: Path, name: str) -> BinaryIO:
    """The regular file `name` of a folder. Raises UserError where it is none or leads out of the folder, else OSError."""
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path} is a link out of {folder}; replace it with the file itself")
    return open_regular(path)


def member_sha256(folder: Path, name: str, size: int | None = None) -> tuple[int, str]:
    """Bytes and hexadecimal SHA-256 of a file of a folder; where it does not have the given size, nothing is read and the sum is
    empty. Raises as ``open_member``."""
    with open_member(folder, name) as file:
        found = os.fstat(file.fileno()).st_size
        if size is not None and found != size:
            return found, ""
        return found, sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Hexadecimal SHA-256 of the rest of an open file."""
    return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()
