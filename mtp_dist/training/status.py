"""status.json in the run folder: the one word that a launcher can trust about how a job ended.

Exit codes race with signals; this file is written by rank 0 after the last checkpoint is safe.
"""

import json
import os
from pathlib import Path
from typing import Any

from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, parsed, typed
from mtp_dist.regular_file import read_regular

STATUS = "status.json"
LARGEST = 1 << 16
"""Of the file, in bytes."""
RUNNING, STOPPED, FINISHED, FAILED = "running", "stopped", "finished", "failed"


def write_status(run_dir: Path, state: str, step: int, **more: str | int) -> None:
    """`state`: running | stopped (asked to, checkpoint written) | finished | failed. Replaced in one move."""
    temporary = run_dir / f".{STATUS}.{os.getpid()}"
    temporary.write_text(json.dumps({"state": state, "step": step, **more}) + "\n")
    os.replace(temporary, run_dir / STATUS)


def was_stopped(run_dir: Path) -> bool:
    """Whether the run's last job was asked to stop, and saved."""
    try:
        content = typed(parsed(read_regular(run_dir / STATUS, LARGEST)), dict[str, Any])
    except (OSError, FormError, UserError):
        return False
    return content.get("state") == STOPPED
