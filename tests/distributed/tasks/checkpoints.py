"""Checkpoints that are saved under one layout, loaded under another, or damaged on purpose."""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from mtp_dist.config.schema import TrainingRun
from mtp_dist.parallel.mesh import build_mesh
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import Workload, build
from tests.distributed.layouts import configuration, draft_tokens
from tests.distributed.tasks.step import own_rows


def _next_losses(workload: Workload, config: TrainingRun, steps: range) -> list[float]:
    parts = coefficients(config.mtp, 0)
    found = []
    for step in steps:
        totals, _ = workload.step(own_rows(config, workload.mesh, step), parts, config.optim.lr)
        found.append(totals.loss)
    return found


def _save(workload: Workload, config: TrainingRun, root: str, tokenizer: str) -> None:
    from mtp_dist.checkpoint.writer import Saver

    saver = Saver(Path(root), config, workload.mesh, workload.engine, Path(tokenizer))
    saver.begin(step=2, progress={}, data={}, tracker={"run_id": "none"})
    saver.finish()


def save_under(layout: str, root: str, tokenizer: str) -> list[float]:
    """A checkpoint after two steps, in root/step_00000002. Returns the losses of the two steps after it."""
    config = configuration(layout)
    workload = build(config, build_mesh(config.parallel, torch.device("cpu")), draft_tokens(config))
    _next_losses(workload, config, range(2))
    _save(workload, config, root, tokenizer)
    return _next_losses(workload, config, range(2, 4))


def load_under(layout: str, checkpoint: str, root: str, tokenizer: str) -> list[float]:
    """That checkpoint under another layout, saved again in root before anything is trained. Returns the same losses."""
    from mtp_dist.checkpoint.reader import Checkpoint

    config = configuration(layout)
    workload = build(config, build_mesh(config.parallel, torch.device("cpu")), draft_tokens(config))
    Checkpoint(Path(checkpoint)).load_engine(workload.engine)
    _save(workload, config, root, tokenizer)
    return _next_losses(workload, config, range(2, 4))


def write_later_format(checkpoint: str) -> None:
    """A sound checkpoint of a format that this version does not know."""
    if dist.get_rank() == 0:
        manifest = Path(checkpoint) / "MANIFEST.json"
        manifest.write_text(manifest.read_text().replace("mtp_dist.checkpoint/2", "mtp_dist.checkpoint/9"))
        summed = hashlib.sha256(manifest.read_bytes()).hexdigest()
        manifest.with_name("MANIFEST.sha256").write_text(f"{summed}  MANIFEST.json\n")
    dist.barrier()


def make_folder(path: str) -> None:
    """An empty folder."""
    if dist.get_rank() == 0:
        Path(path).mkdir(parents=True)
    dist.barrier()


def damage(checkpoint: str) -> None:
    """Flip a bit in the middle of rank 0's file."""
    if dist.get_rank() == 0:
        path = Path(checkpoint) / "rank_00000.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    dist.barrier()
