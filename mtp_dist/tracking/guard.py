"""A metrics backend that may fail without harm: the first exception is one warning, then the backend is silent.

metrics.jsonl holds every value anyway, so a missing package, a full disk or a dead network must not end a training job.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

log = logging.getLogger(__name__)


class Backend(Protocol):
    """A place where metrics go beside metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one step's metrics; steps ascend."""

    def close(self) -> None:
        """Write out what is buffered."""


class Guarded:
    """``open_backend()`` made harmless; ``alive`` says whether it still takes metrics."""

    def __init__(self, name: str, open_backend: Callable[[], Backend]) -> None:
        self._name = name
        self._backend: Backend | None = None
        try:
            self._backend = open_backend()
        except Exception as error:
            self._drop(error)

    @property
    def alive(self) -> bool:
        return self._backend is not None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._backend is None:
            return
        try:
            self._backend.log(step, metrics)
        except Exception as error:
            self._drop(error)

    def close(self) -> None:
        backend, self._backend = self._backend, None
        if backend is None:
            return
        try:
            backend.close()
        except Exception as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self._backend = None
        reason = " ".join(str(error).split()) or "no reason given"
        kind = type(error).__name__
        log.warning("%s is off for the rest of this run (%s: %s); metrics.jsonl goes on", self._name, kind, reason)
