"""Whether a checkpoint is of the model that a run describes. Reads settings only, so a launcher can ask before any process
starts."""

from pathlib import Path

from mtp_dist.checkpoint.manifest import CONFIG
from mtp_dist.config import compose
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError

_MODEL = ("model.", "mtp.kind", "mtp.depth", "mtp.concat", "mtp.h0", "mtp.recycle")


def require_same_model(checkpoint: Path, config: TrainingRun) -> None:
    """Raise UserError naming the first setting of the model that differs."""
    for key, here, wanted in compose.differences(compose.load(checkpoint / CONFIG, TrainingRun), config):
        if key.startswith(_MODEL) and key != "model.init_std":
            raise UserError(
                f"checkpoint {checkpoint} is of another model: its {key} is {here}, this run's is {wanted}; "
                f"set {key}={here}, or choose a new run_dir"
            )
