"""A wandb run, offline by default, that stays one run over any number of restarts.

wandb (0.31) counts offline steps from 0 in each start and a kill loses rows that it had buffered. So each row names its step,
the rows already in the run folder are read back at a resume (``wandb leet inspect``, the tool's own reader), a row that wandb has
is not sent twice, and a row that it lost is sent again from metrics.jsonl. All that wandb keeps lies in ``<run_dir>/wandb`` (its
service holds a temporary folder for its socket while it runs); ``wandb sync <run_dir>/wandb/offline-run-*`` uploads it later.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtp_dist.config.schema import TrackerConfig
from mtp_dist.tracking.jsonl import encode

# A run that cannot reach its server must end all the same; what is not uploaded stays on disk.
FINISH_SECONDS = 60.0
INIT_SECONDS = 60.0


def confine(run_dir: Path) -> None:
    """Point every folder that wandb writes to below the run folder, whatever the environment said before."""
    os.environ["WANDB_DIR"] = str(run_dir)
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        os.environ[f"WANDB_{name}_DIR"] = str(run_dir / "wandb" / name.lower())


def logged_steps(segment: Path) -> Iterable[int]:
    """Steps held by one start's folder (``offline-run-*`` or ``run-*``), torn or whole. RuntimeError if it cannot be read."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        for line in reader.stdout:
            record = json.loads(line)
            if record.get("type") == "history":
                yield int(record["history"]["item"]["_step"])
        complaint = reader.stderr.read().decode(errors="replace").strip()
    # A file cut by a kill is read to its end and then reported as incomplete: that is what we came for.
    if reader.returncode != 0 and "incomplete" not in complaint:
        raise RuntimeError(f"wandb cannot read {segment}: {complaint}")


def highest_step(run_dir: Path) -> int:
    """The highest step in any segment of the run folder; -1 where there is none."""
    segments = [path for pattern in ("offline-run-*", "run-*") for path in (run_dir / "wandb").glob(pattern)]
    return max((step for segment in segments if any(segment.glob("*.wandb")) for step in logged_steps(segment)), default=-1)


class WandbRun:
    """One start of the run. ``backlog`` are the records of metrics.jsonl, sent where wandb lacks them. Errors: wandb's own."""

    def __init__(
        self, run_dir: Path, config: TrackerConfig, settings: Mapping[str, Any], run_id: str, backlog: Iterable[Mapping[str, Any]]
    ) -> None:
        confine(run_dir)
        import wandb

        if config.wandb == "online" and not wandb.login(prompt=False):
            # Without a key wandb would ask for one at the terminal, and a job of many ranks would wait for the answer.
            raise RuntimeError("no wandb API key; set WANDB_API_KEY or run `wandb login`, or choose tracker.wandb=offline")
        self._highest = highest_step(run_dir)
        self._run = wandb.init(
            mode="online" if config.wandb == "online" else "offline",
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            project=config.project,
            entity=config.entity,
            name=config.name or run_dir.name,
            tags=config.tags or None,
            config=dict(settings),
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                disable_git=True,
                disable_code=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )
        if config.wandb == "online":
            self._highest = int(self._run.starting_step) - 1
        for record in backlog:
            self.log(record["step"], {name: value for name, value in record.items() if name != "step"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one row, unless wandb holds that step or a later one already (it would drop the row)."""
        if step > self._highest:
            self._run.log({name: encode(value) for name, value in metrics.items()}, step=step)
            self._highest = step

    def close(self) -> None:
        self._run.finish()
