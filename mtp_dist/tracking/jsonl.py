"""metrics.jsonl: one JSON object a line, ``{"step": 7, "loss/total": 3.2, ...}``; the truth about a run.

Contract: steps ascend strictly, so each appears exactly once however often a run was killed and resumed. Opening the file at
``resume_step`` N cuts every record with a step above N (those steps are about to be trained again) and whatever a kill left half
written. JSON has no NaN: a non-finite value is written as "NaN", "Infinity" or "-Infinity", which ``float()`` takes back.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtp_dist.errors import UserError
from mtp_dist.json_document import parsed, typed
from mtp_dist.quantity import counted
from mtp_dist.regular_file import open_regular

METRICS_FILE = "metrics.jsonl"
SYNC_SECONDS = 5.0
LONGEST = 1 << 20
"""Of a line, in bytes; one takes about a thousand."""

log = logging.getLogger(__name__)


def encode(value: float) -> float | str:
    """A finite number as it is, a non-finite one as the word that ``float()`` reads."""
    number = float(value)
    if math.isfinite(number):
        return value
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")


def _decode(line: bytes) -> dict[str, Any] | None:
    """One record, or None for a line that is not a whole one."""
    try:
        record = typed(parsed(line), dict[str, int | float | str])
        if type(record.get("step")) is not int:
            return None
        return {name: float(value) if isinstance(value, str) else value for name, value in record.items()}
    except ValueError:
        return None


def _lines(path: Path) -> Iterator[bytes]:
    """Of a regular file; what follows the first ``LONGEST`` bytes of a line is a line of its own, and no record. Raises
    UserError where it cannot be read."""
    try:
        with open_regular(path) as stream:
            while line := stream.readline(LONGEST):
                yield line
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records in file order; ``step`` is an int, everything else a number. A missing file is an empty list.

    Raises UserError where something else than a file lies there."""
    if _is_to_come(path):
        return []
    return [record for line in _lines(path) if line.endswith(b"\n") and (record := _decode(line)) is not None]


class MetricsFile:
    """The open file of one run; ``last_step`` is the step of its last record, -1 where it has none."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.last_step = _cut(path, resume_step)
        self._stream = path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record and flush it; the disk is told to keep it every few seconds. ValueError for a step logged before."""
        if step <= self.last_step:
            raise ValueError(f"step {step} is logged already: {self.path} ends at {self.last_step}, and a step has one record")
        record = {"step": step} | {name: encode(value) for name, value in metrics.items()}
        self._stream.write(json.dumps(record, allow_nan=False) + "\n")
        self._stream.flush()
        self.last_step = step
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Flush to the disk and close; a second call does nothing."""
        if not self._stream.closed:
            try:
                self._sync()
            finally:
                self._stream.close()


def _is_to_come(path: Path) -> bool:
    """Whether there is no file yet, or a link to one that is still to come."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:  # said by whoever opens it
        return False
    return False


def _cut(path: Path, resume_step: int) -> int:
    """Leave the records up to ``resume_step``; rewritten only where something has to go. Returns the last step, or -1."""
    if _is_to_come(path):
        return -1
    kept: list[bytes] = []
    last, lost, whole = -1, 0, True
    for line in _lines(path):
        record = _decode(line) if line.endswith(b"\n") else None
        if record is not None and last < record["step"] <= resume_step:
            kept.append(line)
            last = record["step"]
        else:
            whole = False
            lost += record is None
    if not whole:
        _replace(path, b"".join(kept))
    if lost:
        log.warning("%s: removed %s of an interrupted run", path, counted(lost, "unfinished line"))
    return last


def _replace(path: Path, content: bytes) -> None:
    """Swap the file's content in one rename, so that a kill leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
