"""Checkpoints of two unlike models, saved by two processes."""

import os
from pathlib import Path

# Read when the libraries load: a test of local files must not look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.distributed.pool import run_jobs

STEPS = 6
# Steps so large that norms, which start as ones, differ from each other by far more than rounding.
LEARNING = {"train.dtype": "float32", "optim.lr": 0.05, "optim.clip": 0.0}
KINDS = {
    "tied": ("pp2_zbv", {}),
    # Fragments of two tensor ranks, an output matrix of its own, and W_k with its halves the other way round.
    "untied": ("tp2", {"model.tie_embeddings": False, "mtp.concat": "hidden_first"}),
    # Shards of two replicas.
    "pre_norm": ("dp2_zero1", {"mtp.h0": "pre_norm", "train.dtype": "bfloat16"}),
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("interop")
    jobs = []
    for kind, (layout, overrides) in KINDS.items():
        arguments = {"layout": layout, "data": str(tiny_dataset), "run_dir": str(folder / kind), "steps": STEPS, "stops": [],
                     "overrides": {**LEARNING, **overrides}}
        jobs.append({"name": kind, "task": "train", "arguments": arguments})
    run_jobs(2, jobs, folder / "pool")
    return {kind: folder / kind / "checkpoints" / f"step_{STEPS:08d}" for kind in KINDS}
