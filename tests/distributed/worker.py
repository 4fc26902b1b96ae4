"""What the processes of a pool run: every job of the list, one after another, each on a mesh of its own.

    torchrun --nproc-per-node N -m tests.distributed.worker JOBS.json OUT

JOBS.json: [{"name": .., "task": a function of tests.distributed.tasks, "arguments": {..}}, ..]. Each rank writes
OUT/<name>.rank<r>.pt, what its task returned.
"""

import importlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist

from mtp_dist.parallel.mesh import choose_device, connect, disconnect


def main(jobs: Path, out: Path) -> None:
    torch.set_num_threads(1)
    connect(choose_device("cpu"), timeout_minutes=5)
    tasks = importlib.import_module("tests.distributed.tasks")
    for job in json.loads(jobs.read_text()):
        result = getattr(tasks, job["task"])(**job["arguments"])
        torch.save(result, out / f"{job['name']}.rank{dist.get_rank()}.pt")
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
