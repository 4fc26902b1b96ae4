"""Batches prepared ahead in a background thread.

The state that comes with a batch is that of the batch handed out: what was only prepared never counts.
"""

import queue
import threading
from typing import Protocol

from mtp_dist.data.batch import Batch
from mtp_dist.data.stream import State


class Batches(Protocol):
    """A source of batches: a Stream, or a Prefetch around one."""

    def next(self) -> tuple[Batch, State]: ...

    def close(self) -> None: ...


class Prefetch:
    """Keeps up to `count` (at least 1) batches of `source` ready. An error of the source surfaces in `next`, in its turn."""

    def __init__(self, source: Batches, count: int) -> None:
        if count < 1:
            raise ValueError(f"a prefetch of {count} batches; use the stream itself for none")
        self._source = source
        self._ready: queue.Queue[tuple[Batch, State] | BaseException] = queue.Queue(maxsize=count)
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="data-prefetch", daemon=True)
        self._thread.start()

    def next(self) -> tuple[Batch, State]:
        """The next batch and the state after it; waits for it. Raises what the source raised, then and ever after."""
        if self._error is not None:
            raise self._error
        if self._closing.is_set():
            raise RuntimeError("the prefetch is closed")
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        return item

    def close(self) -> None:
        """End the thread, drop what was prepared, close the source. May be called twice."""
        self._closing.set()
        while self._thread.is_alive():
            # Room in the queue wakes a thread that waits to put.
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._source.close()

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                item: tuple[Batch, State] | BaseException = self._source.next()
            except BaseException as error:
                item = error
            self._ready.put(item)
            if isinstance(item, BaseException):
                return
