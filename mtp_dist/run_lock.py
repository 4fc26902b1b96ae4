"""One job at a time in a run folder: a lock on ``run_dir/.lock`` that its processes hold.

The launcher of the first node takes the lock alone (flock, LOCK_EX), writes who it is, and then shares it (LOCK_SH) with rank 0,
so that the folder stays taken until both have ended, whichever ends first. The kernel lets go of a lock when a process ends, also
by kill -9, so the file may stay: alone it means nothing.

Between machines this holds as far as the file system's flock does: NFS (Linux clients pass it to the server, which keeps the lock
of a lost machine until its lease ends, usually 90 s), others where they are mounted so (Lustre: ``-o flock``). On a file system
without flock a warning says so, and nothing is locked; where locks stay on one machine, only jobs of that machine see each other.
Source: https://man7.org/linux/man-pages/man2/flock.2.html
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mtp_dist.errors import UserError
from mtp_dist.json_document import parsed, typed
from mtp_dist.regular_file import require_regular

NAME = ".lock"
LARGEST = 4096
"""Of the file, in characters."""
# Tells rank 0 that its launcher holds the lock of this folder.
LAUNCHED = "MTP_DIST_RUN_LOCK"
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def held(run_dir: str | os.PathLike[str], *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the run folder (made if it is missing) for the block, as the launcher of its processes.

    ``wait_seconds``: how long to wait for one that has it. Raises UserError naming who has it, and for a folder that
    cannot be written.
    """
    with _opened(run_dir) as file:
        _lock(file, run_dir, wait_seconds)
        os.environ[LAUNCHED] = os.path.realpath(run_dir)
        try:
            yield
        finally:
            os.environ.pop(LAUNCHED, None)


@contextmanager
def shared(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the run folder for the block, in rank 0: with its launcher, or alone where no launcher of this project started it."""
    with _opened(run_dir) as file:
        if os.environ.get(LAUNCHED) == os.path.realpath(run_dir):
            _flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        else:
            _lock(file, run_dir, 0.0)
        yield


def require_free(run_dir: str | os.PathLike[str], *, wait_seconds: float = 0.0) -> None:
    """Raise UserError where a job has the run folder now. Leaves nothing where there is no such folder."""
    if (Path(run_dir) / NAME).exists():
        with held(run_dir, wait_seconds=wait_seconds):
            pass


def _opened(run_dir: str | os.PathLike[str]) -> IO[str]:
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        place = Path(run_dir) / NAME
        if os.path.lexists(place):
            require_regular(place)
        return open(place, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: {error.strerror}") from None


def _lock(file: IO[str], run_dir: str | os.PathLike[str], wait_seconds: float) -> None:
    end = time.monotonic() + wait_seconds
    while not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if time.monotonic() >= end:
            raise UserError(
                f"run_dir={run_dir} is in use by {_holder(file)}; stop that job, or choose another run_dir "
                "(a further node of the same job needs its own launch.node_rank)"
            )
        time.sleep(min(1.0, wait_seconds))
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}) + "\n")
    file.flush()
    _flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _flock(file: IO[str], operation: int) -> bool:
    """False where another process has the lock; True also, after a warning, where the file system has no locks."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _UNSUPPORTED:
            raise UserError(f"{file.name} cannot be locked: {error.strerror}") from None
        print(
            f"warning: the file system of {file.name} has no locks ({error.strerror}); start one job at a time there",
            file=sys.stderr,
        )
    return True


def _holder(file: IO[str]) -> str:
    """Who has written itself down; the one that has the lock may not have come to it yet."""
    try:
        file.seek(0)
        holder = typed(parsed(file.read(LARGEST)), dict[str, int | str])
        return f"another job (host {holder['host']}, process {holder['pid']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another job, which has just started"
