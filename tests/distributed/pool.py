"""Runs jobs in real processes: one pool a world size at a time.

Importing torch and deepspeed costs seconds a process, a tiny layout costs milliseconds; so ranks are forked from one process that
has imported everything (``preloaded``), and stay for later jobs. Not for too many, nor longer than a module of tests: every group
of a job leaves a thread behind, which may go on polling connections that its peers have closed.
"""

import atexit
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.worker import serve

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preloaded"])
ROOT = Path(__file__).parents[2]
LIMIT = 500.0
"""Seconds that the jobs of one request may take."""
JOBS = 12
"""Jobs of a pool, after which fresh ranks take its place."""


def run_jobs(world: int, jobs: list[dict[str, Any]], folder: Path) -> dict[str, list[Any]]:
    """name -> what the job's task returned on each rank. Raises with the processes' output if they fail."""
    folder.mkdir(parents=True, exist_ok=True)
    for begin in range(0, len(jobs), JOBS):
        pool = _pools[world] = _pools.get(world) or Pool(world)
        try:
            pool.run(jobs[begin : begin + JOBS], folder)
        except BaseException:
            _pools.pop(world).kill()
            raise
        if pool.jobs >= JOBS:
            _pools.pop(world).kill()
    return {
        job["name"]: [torch.load(folder / f"{job['name']}.rank{rank}.pt", weights_only=False) for rank in range(world)]
        for job in jobs
    }


def rendezvous(world: int) -> tuple[dist.TCPStore, dict[str, str]]:
    """The store at which ranks meet, which must live as long as they do, and what tells them of it in their environment. As
    torchrun does, it is made here: a free port that is only looked up may be taken before rank 0 listens there."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    return store, place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def end_pools() -> None:
    """End every pool; a later job starts its own."""
    while _pools:
        _pools.popitem()[1].kill()


class Pool:
    """Ranks that wait for requests in a folder (see ``worker``) until they are told to stop or their parent is gone."""

    def __init__(self, world: int) -> None:
        self.world, self.requests, self.jobs = world, 0, 0
        self.folder = Path(tempfile.mkdtemp(prefix=f"pool{world}-"))
        self.meeting, place = rendezvous(world)
        self.ranks = []
        for rank in range(world):
            variables = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            process = CONTEXT.Process(target=serve, args=(str(self.folder), os.getpid(), variables), daemon=True)
            process.start()
            self.ranks.append(process)
        atexit.register(self.close)

    def run(self, jobs: list[dict[str, Any]], folder: Path) -> None:
        """Return when every rank has done every job and written its result."""
        self.jobs += len(jobs)
        request = self.folder / f"request{self.requests}"
        self.requests += 1
        request.with_suffix(".new").write_text(json.dumps({"jobs": jobs, "out": str(folder)}))
        request.with_suffix(".new").rename(request)
        done = [request.with_suffix(f".done{rank}") for rank in range(self.world)]
        deadline = time.monotonic() + LIMIT
        while not all(path.exists() for path in done):
            if not all(rank.is_alive() for rank in self.ranks) or time.monotonic() > deadline:
                raise RuntimeError(f"pool of {self.world} failed on {[job['name'] for job in jobs]}:\n{self.output()[-12000:]}")
            time.sleep(0.02)

    def output(self) -> str:
        """What the ranks printed."""
        logs = sorted(self.folder.glob("out.*"))
        return "".join(f"rank {log.suffix[1:]}:\n{log.read_text(errors='replace')}" for log in logs)

    def close(self) -> None:
        """Let the ranks end; they leave together."""
        (self.folder / "stop").touch()
        for rank in self.ranks:
            rank.join(20)
        self.kill()

    def kill(self) -> None:
        """End the ranks, whatever they do."""
        atexit.unregister(self.close)
        for rank in self.ranks:
            rank.kill()
            rank.join()
        shutil.rmtree(self.folder, ignore_errors=True)


_pools: dict[int, Pool] = {}
