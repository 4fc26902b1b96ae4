"""TensorBoard events in ``<run_dir>/tensorboard`` (needs the package's ``tensorboard`` extra)."""

from collections.abc import Mapping
from pathlib import Path


class TensorBoardEvents:
    """One start's event file. ``purge_step`` makes TensorBoard forget the steps that a resumed run trains again."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
