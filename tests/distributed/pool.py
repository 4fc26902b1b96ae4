"""Runs a list of jobs in one torchrun a world size: starting a process costs seconds, a tiny layout costs milliseconds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_jobs(world: int, jobs: list[dict[str, Any]], folder: Path) -> dict[str, list[Any]]:
    """name -> what the job's task returned on each rank. Raises with the processes' output if they fail."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world}",
        "-m",
        "tests.distributed.worker",
        str(folder / "jobs.json"),
        str(folder),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    if done.returncode != 0:
        raise RuntimeError(f"pool of {world} failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return {
        job["name"]: [torch.load(folder / f"{job['name']}.rank{rank}.pt", weights_only=False) for rank in range(world)]
        for job in jobs
    }
