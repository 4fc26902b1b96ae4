"""Where a run's metrics go: metrics.jsonl always, wandb and TensorBoard beside it.

``Tracker.log(step, metrics)`` once a step, with all of that step's metrics (``tracking/names.py`` has their names);
``close()`` at the end. The run id belongs in the checkpoint and comes back as ``run_id`` at a resume: wandb keeps one run.
"""

import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_dist.config.schema import TrackerConfig
from mtp_dist.errors import UserError
from mtp_dist.tracking.guard import Guarded
from mtp_dist.tracking.jsonl import METRICS_FILE, MetricsFile, read_records
from mtp_dist.tracking.starts import record_start
from mtp_dist.tracking.tensorboard_events import TensorBoardEvents
from mtp_dist.tracking.wandb_run import WandbRun

MODES = ("offline", "online", "disabled")


def new_run_id() -> str:
    """Eight random characters, the form of wandb's own ids; drawn from the system so that it never moves a training seed."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


class Tracker:
    """The metrics of one start of a run.

    ``run_id``: the id from the checkpoint, None for a new run. ``resume_step``: the last step that is trained already (0: none);
    what was logged above it is cut. ``settings``: the full configuration, shown by wandb. ``on=False``, for every rank but the
    first, writes nothing. Raises UserError for an unknown ``tracker.wandb``; ValueError where a step is logged twice.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackerConfig,
        *,
        settings: Mapping[str, Any],
        run_id: str | None,
        resume_step: int,
        on: bool = True,
    ) -> None:
        if config.wandb not in MODES:
            raise UserError(f"tracker.wandb={config.wandb!r} is not a mode; choose {', '.join(MODES)}")
        self.run_id = run_id or new_run_id()
        self._file: MetricsFile | None = None
        self._backends: list[Guarded] = []
        if not on:
            return
        run_dir = run_dir.resolve()
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        self._file = MetricsFile(path, resume_step)
        record_start(run_dir, resume_step)
        if config.wandb != "disabled":
            backlog = read_records(path)
            self._backends.append(Guarded("wandb", lambda: WandbRun(run_dir, config, settings, self.run_id, backlog)))
        if config.tensorboard:
            self._backends.append(Guarded("TensorBoard", lambda: TensorBoardEvents(run_dir, resume_step)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics of one step, once; later steps are greater."""
        if self._file is None:
            return
        self._file.append(step, metrics)
        for backend in self._backends:
            backend.log(step, metrics)

    def close(self) -> None:
        """Write out everything; a second call does nothing."""
        if self._file is None:
            return
        try:
            self._file.close()
        finally:
            for backend in self._backends:
                backend.close()
