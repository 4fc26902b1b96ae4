"""Whether a checkpoint is of the model that a run describes. Reads settings only, so a launcher can ask before any process
starts."""

from pathlib import Path

from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.config import compose
from mtp_dist.config.heads import CONTRACT, modules
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError

# How weights were drawn, and how the vocabulary's size was found: the size itself is compared.
_NOT_THE_MODEL = ("model.init_std", "model.vocab_multiple")
# Settings that change no weight and no meaning of one.
_POLICY = (*_NOT_THE_MODEL, "model.document_mask")
_HEADS = tuple(f"mtp.{name}" for name in CONTRACT)
_CONTRACT = tuple(name for name in _HEADS if name != "mtp.depth")


def require_same_model(checkpoint: Path, config: TrainingRun) -> None:
    """Raise UserError naming the first setting of the model that differs. A checkpoint whose settings cannot be read is passed
    over: it is damaged, and resuming will say so and take another."""
    try:
        saved = load_settings(checkpoint)
    except UserError:
        return
    for key, here, wanted in compose.differences(saved, config):
        if (key.startswith("model.") and key not in _NOT_THE_MODEL) or key in _HEADS:
            raise UserError(
                f"checkpoint {checkpoint} belongs to a different model: its {key} is {here}, this run's is {wanted}; "
                f"set {key}={here}, or choose a new run_dir (init.checkpoint={checkpoint} starts it from these weights)"
            )


def require_start(checkpoint: Path, config: TrainingRun) -> None:
    """Raise UserError unless a new run of these settings can start from this checkpoint's weights, naming the first setting that
    stands against it. The number of heads may differ, and with ``init.heads=fresh`` their kind."""
    saved = load_settings(checkpoint)
    for key, there, here in compose.differences(saved, config):
        name = f"init.checkpoint={checkpoint}"
        if key.startswith("model.") and key not in _POLICY:
            raise UserError(f"{name} belongs to a different model: its {key} is {there}, this run's is {here}; set {key}={there}")
        if key in _CONTRACT and kept_heads(saved, config):
            raise UserError(f"{name} has heads of {key}={there}, this run's are {here}; set {key}={there}, or init.heads=fresh")


def kept_heads(saved: TrainingRun, config: TrainingRun) -> int:
    """How many modules of a checkpoint's heads, from the first on, a run that starts from it takes over."""
    return min(modules(saved.mtp), modules(config.mtp)) if config.init.heads == "keep" else 0
