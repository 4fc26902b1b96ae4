"""What is kept of a step whose loss or gradient was not finite: its rows, where they came from, and what was seen."""

import json
from pathlib import Path

from safetensors.torch import save_file

from mtp_dist.data.batch import Batch
from mtp_dist.parallel.engine import StepOutcome
from mtp_dist.training.statistics import Totals


def keep_batch(run_dir: Path, step: int, replica: int, batch: Batch, totals: Totals, outcome: StepOutcome) -> Path:
    """Write a reader's rows and sample keys to nonfinite/step_N/; returns that folder."""
    folder = run_dir / "nonfinite" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": batch.tokens, "documents": batch.documents}, folder / f"replica_{replica:05d}.safetensors")
    record = {
        "step": step,
        "replica": replica,
        "loss": str(totals.loss),
        "loss_by_depth": [str(loss) for loss in totals.means()["loss"]],
        "gradient_norm": str(outcome.gradient_norm),
        "samples": batch.samples,
    }
    (folder / f"replica_{replica:05d}.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder
