"""Whether a checkpoint is of the model that a run describes. Reads settings only, so a launcher can ask before any process
starts."""

from pathlib import Path

from mtp_dist.checkpoint.manifest import CONFIG
from mtp_dist.config import compose
from mtp_dist.config.heads import CONTRACT
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError

# How weights were drawn, and how the vocabulary's size was found: the size itself is compared.
_NOT_THE_MODEL = ("model.init_std", "model.vocab_multiple")
_HEADS = tuple(f"mtp.{name}" for name in CONTRACT)


def require_same_model(checkpoint: Path, config: TrainingRun) -> None:
    """Raise UserError naming the first setting of the model that differs. A checkpoint whose settings cannot be read is passed
    over: it is damaged, and resuming will say so and take another."""
    try:
        saved = compose.load(checkpoint / CONFIG, TrainingRun)
    except UserError:
        return
    for key, here, wanted in compose.differences(saved, config):
        if (key.startswith("model.") and key not in _NOT_THE_MODEL) or key in _HEADS:
            raise UserError(
                f"checkpoint {checkpoint} is of another model: its {key} is {here}, this run's is {wanted}; "
                f"set {key}={here}, or choose a new run_dir"
            )
