"""One job at a time in a run folder: a lock on ``run_dir/.lock`` that its processes hold.

The launcher of the first node takes the lock alone (flock, LOCK_EX), writes who it is, and then shares it (LOCK_SH) with rank 0,
which writes itself down, too; so the folder stays taken until both have ended, whichever ends first. The kernel lets go of a lock
when a process ends, also by kill -9, so the file may stay: alone it means nothing. Processes that are forked from a holder do not
keep the lock.

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
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import psutil

from mtp_dist.errors import UserError
from mtp_dist.json_document import parsed, typed
from mtp_dist.regular_file import require_regular
from mtp_dist.standard_streams import say

NAME = ".lock"
LARGEST = 65536
"""Of the file, in bytes."""
# Tells rank 0 that its launcher holds the lock of this folder.
LAUNCHED = "MTP_DIST_RUN_LOCK"
LAUNCHER, RANK_0 = "launcher", "rank 0"
# For so long a lock may be taken by one that only looks (``is_held``), or is changing from one kind to the other.
PASSING_SECONDS = 0.5
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_open: "weakref.WeakSet[FileIO]" = weakref.WeakSet()


@contextmanager
def held(run_dir: str | os.PathLike[str], *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the run folder (made if it is missing) for the block, as the launcher of its processes.

    ``wait_seconds``: how long to wait for one that has it. Raises UserError naming who has it, and for a folder that
    cannot be written.
    """
    with _opened(run_dir) as file:
        _lock(file, run_dir, LAUNCHER, wait_seconds)
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
            _share(file, run_dir)
            _write(file, [*_records(file), _record(RANK_0)])
        else:
            _lock(file, run_dir, RANK_0, 0.0)
        yield


def require_free(run_dir: str | os.PathLike[str], *, wait_seconds: float = 0.0) -> None:
    """Raise UserError where a job has the run folder now. Leaves nothing where there is no such folder."""
    if (Path(run_dir) / NAME).exists():
        with held(run_dir, wait_seconds=wait_seconds):
            pass


def is_held(run_dir: str | os.PathLike[str]) -> bool:
    """Whether a job has the run folder now, as far as this machine can tell. Changes nothing."""
    try:
        require_regular(Path(run_dir) / NAME)
        with FileIO(Path(run_dir) / NAME, "r") as file:
            return not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (OSError, UserError):
        return True  # unknown: nobody may take the run for dead


def _opened(run_dir: str | os.PathLike[str]) -> FileIO:
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        place = Path(run_dir) / NAME
        if os.path.lexists(place):
            require_regular(place)
        file = FileIO(os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: {error.strerror}") from None
    _open.add(file)
    return file


def _close_in_child() -> None:
    """A forked process shares the lock of its parent, and would keep it when that one is dead."""
    for file in list(_open):
        with suppress(OSError):
            file.close()


os.register_at_fork(after_in_child=_close_in_child)


def _lock(file: FileIO, run_dir: str | os.PathLike[str], role: str, wait_seconds: float) -> None:
    began = time.monotonic()
    end, said = began + max(wait_seconds, PASSING_SECONDS), False
    while not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if time.monotonic() >= end:
            raise UserError(
                f"run_dir={run_dir} is in use by {_holder(file, run_dir)}; stop that job, or choose another run_dir "
                "(a further node of the same job needs its own launch.node_rank)"
            )
        if wait_seconds and not said and time.monotonic() - began > PASSING_SECONDS:
            said = True
            say(f"run_dir={run_dir} is in use by {_holder(file, run_dir)}; waiting up to {wait_seconds:.0f} s")
        time.sleep(min(wait_seconds, 1.0) if said else 0.05)
    _write(file, [_record(role)])
    _share(file, run_dir)


def _share(file: FileIO, run_dir: str | os.PathLike[str]) -> None:
    end = time.monotonic() + 10 * PASSING_SECONDS
    while not _flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB):
        if time.monotonic() >= end:
            raise UserError(f"run_dir={run_dir} was taken by {_holder(file, run_dir)} at the same moment; start again")
        time.sleep(0.02)


def _flock(file: FileIO, operation: int) -> bool:
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


# Who has it: for people; the lock itself is the kernel's


def _record(role: str) -> dict[str, Any]:
    own = psutil.Process()
    born = round(own.create_time(), 1)
    return {"role": role, "host": socket.gethostname(), "pid": own.pid, "born": born, "since": time.strftime("%F %T")}


def _write(file: FileIO, records: list[dict[str, Any]]) -> None:
    with suppress(OSError):  # a full disk: the lock holds without its words
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), "".join(json.dumps(record) + "\n" for record in records).encode(), 0)


def _records(file: FileIO) -> list[dict[str, Any]]:
    """Who has written itself down; none where one that has the lock has not come to it yet."""
    try:
        lines = os.pread(file.fileno(), LARGEST, 0).splitlines()
        found = [typed(parsed(line), dict[str, Any]) for line in lines]
        return [{"host": str(each["host"]), "pid": int(each["pid"]), "since": str(each["since"])} | each for each in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _alive(record: dict[str, Any]) -> bool:
    """Whether a process of this machine still is the one that wrote itself down (ids are used again)."""
    try:
        born = psutil.Process(record["pid"]).create_time()
    except psutil.Error:
        return False
    return "born" not in record or abs(born - float(record["born"])) < 2


def _holder(file: FileIO, run_dir: str | os.PathLike[str]) -> str:
    records = _records(file)
    if not records:
        return "another job, which has just started"
    host, since = records[0]["host"], records[0]["since"]
    if host != socket.gethostname():
        named = ", ".join(_named(record, "") for record in records)
        return f"another job (host {host}, {named}, since {since}; another machine, so not known here whether it is alive)"
    alive = [_alive(record) for record in records]
    named = ", ".join(_named(record, "alive" if lives else "ended") for record, lives in zip(records, alive, strict=True))
    if any(alive):
        return f"another job (host {host}, {named}, since {since})"
    left = ", ".join(f"process {process.pid} ({process.info['name']})" for process in _openers(Path(run_dir) / NAME))
    what = f"what it left behind: {left}" if left else "a process that is not visible here"
    return f"another job (host {host}, {named}, since {since}) or by {what}"


def _named(record: dict[str, Any], state: str) -> str:
    role = record.get("role", LAUNCHER)
    return f"{role}: process {record['pid']}" + (f" ({state})" if state else "")


def _openers(path: Path) -> list[psutil.Process]:
    """Processes of this machine that have a file open."""
    target = os.path.realpath(path)
    found = []
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(each.path == target for each in process.open_files()):
                found.append(process)
    return found
