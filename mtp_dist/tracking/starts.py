"""starts.jsonl in the run folder: one line for each start of a run, ``{"step": 120, "time": "2026-01-31T12:00:00+00:00"}``.

``step`` is the last step that was trained already, 0 for a new run. metrics.jsonl has each step once however often the run was
stopped, so this is what shows where. Reports need it, training never reads it.
"""

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtp_dist.regular_file import require_regular

STARTS_FILE = "starts.jsonl"


def record_start(run_dir: Path, step: int) -> None:
    """Append this start. Raises UserError where something else than a file lies there: opening a FIFO would wait indefinitely."""
    path = run_dir / STARTS_FILE
    with contextlib.suppress(FileNotFoundError):
        require_regular(path)
    line = json.dumps({"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """All starts, oldest first; what is no line of such a file is passed over. A run of an earlier version has none."""
    path = run_dir / STARTS_FILE
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            found.append({"step": record["step"], "time": str(record.get("time", ""))})
    return found
