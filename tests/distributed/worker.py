"""A rank of a pool: it runs every request that appears in a folder, each job on a mesh of its own.

FOLDER/request<i>, i = 0, 1, ..: {"jobs": [{"name": .., "task": a function of tests.distributed.tasks, "arguments": {..}}, ..],
"out": folder}. Each rank writes out/<name>.rank<r>.pt, what its task returned, then FOLDER/request<i>.done<r>. FOLDER/stop, or
the end of the parent process, ends it.
"""

import importlib
import json
import os
import time
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist


def serve(folder: str, parent: int, variables: dict[str, str]) -> None:
    """The whole life of a rank. `variables`: its environment; what it prints goes to FOLDER/out.<rank>."""
    os.environ.clear()
    os.environ.update(variables)
    log = os.open(f"{folder}/out.{variables['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from mtp_dist.parallel.mesh import choose_device, connect, disconnect

    torch.set_num_threads(1)
    connect(choose_device("cpu"), timeout_minutes=5)
    for i in count():
        request = Path(folder) / f"request{i}"
        while not request.exists():
            if (Path(folder) / "stop").exists() or not Path(f"/proc/{parent}").exists():
                disconnect()
                return
            time.sleep(0.02)
        _answer(request)


def _answer(request: Path) -> None:
    tasks = importlib.import_module("tests.distributed.tasks")
    asked = json.loads(request.read_text())
    for job in asked["jobs"]:
        result = getattr(tasks, job["task"])(**job["arguments"])
        torch.save(result, Path(asked["out"]) / f"{job['name']}.rank{dist.get_rank()}.pt")
        _leave_groups()
    request.with_suffix(f".done{dist.get_rank()}").touch()


def _leave_groups() -> None:
    """Close every group that a job made: each costs threads and open files, and a session has hundreds of jobs."""
    dist.barrier()
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
