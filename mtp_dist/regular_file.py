"""Open files that others may have put there: regular files only, and no more bytes than the caller expects.

A FIFO blocks whoever opens it, `/dev/zero` never ends, a terminal waits for its user. Any of them, or a link to one, may stand
in place of a file that we read. Files are opened without blocking, and the *descriptor* is examined, so nothing can be swapped
in between.

    with open_regular(path) as file: ...
    data = read_regular(path, limit=64 * MIB)
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mtp_dist.errors import UserError

MIB = 2**20

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind(path: str | os.PathLike[str]) -> str:
    """What is at `path`, links followed: "a regular file", "a folder", "a FIFO", ..., or "a broken link"; else OSError."""
    try:
        return _named(os.stat(path).st_mode)
    except FileNotFoundError:
        if os.path.islink(path):
            return "a broken link"
        raise


def require_regular(path: str | os.PathLike[str]) -> int:
    """The size in bytes of a file that a library will open by its name (memory maps, Arrow, safetensors).

    Raises UserError where `path` is not a regular file, OSError where it does not exist or cannot be examined.
    """
    found = os.stat(path)
    _refuse(path, found.st_mode)
    return found.st_size


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """`open(path, "rb")` for a regular file. Never blocks.

    Raises UserError where `path` is anything else, OSError (FileNotFoundError, PermissionError, ...) as `open` does.
    """
    # Before opening, too: opening a device can already act on it (rewind a tape, take a terminal), and a socket cannot be opened.
    require_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a regular file, `limit` at most.

    Raises UserError where `path` is not a regular file or holds more, OSError as `open` and `read` do. Files whose size is not
    known beforehand (under /proc) are bounded as well.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1) or b""
        if max(size, len(data)) > limit:
            raise UserError(f"{path} is {max(size, len(data))} bytes or more; at most {limit} are expected there")
        return data


def _refuse(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        link = f" (a link to {os.path.realpath(path)})" if os.path.islink(path) else ""
        raise UserError(f"{Path(path)}{link} is {_named(mode)}, not a regular file; replace it with one")


def _named(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a regular file" if stat.S_ISREG(mode) else "a special file")
