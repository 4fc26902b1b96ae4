"""Seconds of the parts of a step. On a GPU by events in its stream: nothing waits for the device until the times are read."""

import time

import torch


class PhaseClock:
    """``mark`` between the parts, ``seconds`` for the time between each two marks."""

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []

    def restart(self) -> None:
        """A new step: forget the marks and set the first."""
        self._marks = []
        self.mark()

    def mark(self) -> None:
        if self._events:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each part, in order. Waits for the device."""
        if self._events and self._marks:
            self._marks[-1].synchronize()  # type: ignore[union-attr]
            return [a.elapsed_time(b) / 1000 for a, b in zip(self._marks, self._marks[1:], strict=False)]  # type: ignore[union-attr,arg-type]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]  # type: ignore[operator]
