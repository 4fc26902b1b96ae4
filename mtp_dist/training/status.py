"""status.json in the run folder: the one word that a launcher can trust about how a job ended.

Exit codes race with signals; this file is written by rank 0 after the last checkpoint is safe, and by the launcher of the first
node where rank 0 could not. A job of which every process was killed leaves ``running`` behind: ``current`` knows better, as
nobody holds the run folder any more, and corrects the file.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_dist import run_lock
from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, parsed, typed
from mtp_dist.regular_file import open_regular

STATUS = "status.json"
RUNNING, STOPPED, FINISHED, FAILED, KILLED = "running", "stopped", "finished", "failed", "killed"
LARGEST = 1 << 16
"""Of the file, in bytes."""


@dataclass(frozen=True)
class Status:
    """``state``: running | stopped (asked to, all saved) | finished | failed (by an error) | killed (ended without a word).
    ``step``: the last one, of a run that was killed the one that its last start began with. ``total``: None where not known.
    ``mark``: changes with every write."""

    state: str
    step: int
    total: int | None
    mark: tuple[int, int]


def write_status(run_dir: Path, state: str, step: int, **more: str | int) -> None:
    """Replaced in one move; on a full disk, where there is a file already, in place. Raises OSError."""
    path, temporary = run_dir / STATUS, run_dir / f".{STATUS}.{os.getpid()}"
    content = json.dumps({"state": state, "step": step, **more}) + "\n"
    try:
        temporary.write_text(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not path.is_file():
            raise
        try:
            with path.open("r+") as file:
                file.write(content)
                file.truncate()
        except OSError:
            raise error from None


def read_status(run_dir: Path) -> Status | None:
    """What the file says; None where there is none that can be read."""
    path = run_dir / STATUS
    try:
        with open_regular(path) as file:
            found = typed(parsed(file.read(LARGEST)), dict[str, Any])
            about = os.fstat(file.fileno())
        total = found.get("total")
        mark = (about.st_ino, about.st_mtime_ns)
        return Status(str(found["state"]), int(found["step"]), None if total is None else int(total), mark)
    except (OSError, UserError, FormError, ValueError, KeyError, TypeError):
        return None


def current(run_dir: Path) -> Status | None:
    """What holds now. Of a run that says ``running`` while no process has its folder: ``killed``, and the file says so, too."""
    found = read_status(run_dir)
    if found is None or found.state != RUNNING or run_lock.is_held(run_dir):
        return found
    again = read_status(run_dir)
    if again != found or found is None:
        return again  # a job ended between the two looks
    close_status(run_dir, KILLED, found)
    return Status(KILLED, found.step, found.total, found.mark)


def close_status(run_dir: Path, state: str, found: Status | None, step: int | None = None) -> None:
    """Write the last word on a job that could not write its own, where the disk allows it."""
    more = {} if found is None or found.total is None else {"total": found.total}
    with suppress(OSError):
        write_status(run_dir, state, step if step is not None else (found.step if found else 0), **more)
