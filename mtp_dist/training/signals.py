"""Stopping on request: SIGTERM, SIGINT or SIGUSR1 sent to any process lets the step in progress end; all ranks then save and
leave together."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """True once a signal has come. Install in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
