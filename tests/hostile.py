"""What may lie in the place of a file, and a limit for a test that must not hang."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Late(BaseException):
    """Of its own kind, so that nothing under test takes it for an error of its input."""


KINDS = ("fifo", "socket", "folder", "device", "terminal", "loop")


def put(kind: str, path: Path) -> None:
    """Something that is no file under the name of one."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket has room for 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "terminal": "/dev/ptmx", "loop": path}[kind])


@contextmanager
def no_hang(seconds: int = 30) -> Iterator[None]:
    """``Late`` where the block takes longer."""

    def late(*_: object) -> None:
        raise Late(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
