"""Stopping on request: SIGTERM, SIGINT, SIGHUP or SIGUSR1 sent to any process lets the step in progress end; all ranks then save
and leave together.

Before the first step there is nothing to save. There the signals end a rank at once, where its launcher sees all ranks
(``end_at_once``); of a job of several machines the request is kept, since ranks elsewhere would wait for one that left.
"""

import os
import signal
from collections.abc import Mapping
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """``asked``: true once a signal has come after ``install``."""

    def __init__(self) -> None:
        self.asked = False

    def install(self) -> "StopRequest":
        """In the main thread. A SIGHUP that is ignored stays so, as nohup wants it."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def end_at_once() -> None:
    """Let SIGINT end this process without a traceback, as the other signals do by themselves."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_one_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher of this machine sees every rank of the job."""
    return environment.get("LOCAL_WORLD_SIZE", "") == environment.get("WORLD_SIZE")
