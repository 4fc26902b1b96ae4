"""status.json in the run folder: the one word that a launcher can trust about how a job ended.

Exit codes race with signals; this file is written by rank 0 after the last checkpoint is safe.
"""

import json
import os
from pathlib import Path

STATUS = "status.json"
RUNNING, STOPPED, FINISHED, FAILED = "running", "stopped", "finished", "failed"


def write_status(run_dir: Path, state: str, step: int, **more: str | int) -> None:
    """`state`: running | stopped (asked to, checkpoint written) | finished | failed. Replaced in one move."""
    temporary = run_dir / f".{STATUS}.{os.getpid()}"
    temporary.write_text(json.dumps({"state": state, "step": step, **more}) + "\n")
    os.replace(temporary, run_dir / STATUS)


def was_stopped(run_dir: Path) -> bool:
    """Whether the run's last job was asked to stop, and saved."""
    try:
        return bool(json.loads((run_dir / STATUS).read_text())["state"] == STOPPED)
    except (OSError, ValueError, KeyError):
        return False
