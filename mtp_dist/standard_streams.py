"""Standard output and error that may go away: a reader that left (``| head``), a terminal that was closed, a full disk.

``survive_closing()`` makes what is printed from then on no reason to fail. Where nobody can read any more, the stream goes to
/dev/null, also for libraries that write to its descriptor; where a disk is full, what does not fit is lost and the next line is
tried again.
"""

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EFBIG)


class SurvivingStream:
    """A text stream whose ``write`` and ``flush`` do not fail for want of a place to write to."""

    def __init__(self, stream: TextIO, descriptor: int) -> None:
        self._stream, self._descriptor = stream, descriptor

    def write(self, text: str) -> int:
        with suppress(ValueError):  # closed
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lost(error)
        return len(text)

    def flush(self) -> None:
        with suppress(ValueError):
            try:
                self._stream.flush()
            except OSError as error:
                self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno in _PASSING:
            return
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive_closing() -> None:
    """For the rest of this process; a second call does nothing."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, SurvivingStream):
            continue
        setattr(sys, name, SurvivingStream(stream, descriptor))


def say(text: str) -> None:
    """A line on the standard error, also from a signal handler: nothing is buffered and nothing raised."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))
