"""Efficiency of two pipeline ranks on two cores: the time of one process on one core, over twice that of two with PP = 2.

    python -m benchmarks.one_core

Two jobs are started by torchrun, one of one process and one of two, every process pinned to a core of its own, one thread each.
Then they take turns: each step is one of this project's (forward, backward, AdamW) on the same model, batch and micro-batches,
float32. While one job works the other waits for a line in a pipe.
1.0: two cores are twice as fast. Below it are the bubble, messages, the layers that cannot be split evenly, and what two busy
cores take from each other (caches, memory; two cores may be two threads of one).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from benchmarks.small_run import add_model_options, finish, random_batch, run_of
from benchmarks.timing import median_interval
from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import build

ROOT = Path(__file__).parents[1]


def work(options: argparse.Namespace) -> None:
    """A process of a job: a step for each line that comes, answered by its seconds."""
    cores = sorted(os.sched_getaffinity(0))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    connect(choose_device("cpu"), timeout_minutes=30)
    config = run_of(options)
    config.parallel.pipeline, config.parallel.placement = world, options.placement if world > 1 else "balanced"
    config = finish(config)
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    workload, parts, batch = build(config, mesh), coefficients(config.mtp, 0), random_batch(config)
    with ExitStack() as files:
        calls = files.enter_context(open(options.worker + ".go")) if rank == 0 else None
        answers = files.enter_context(open(options.worker + ".done", "w")) if rank == 0 else None
        while True:
            line = [calls.readline() if calls else None]
            dist.broadcast_object_list(line)
            if not line[0]:
                break
            begin = time.perf_counter()
            loss = workload.step(batch if mesh.is_reader else None, parts, config.optim.lr)[0].loss
            dist.barrier()
            if answers:
                print(time.perf_counter() - begin, loss, file=answers, flush=True)
    disconnect()


class Job:
    """A running job of `world` processes."""

    def __init__(self, world: int, folder: Path, arguments: list[str]) -> None:
        name = str(folder / f"world{world}")
        os.mkfifo(name + ".go")
        os.mkfifo(name + ".done")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launcher, "-m", "benchmarks.one_core", "--worker", name, *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)
        self.calls: IO[str] = open(name + ".go", "w")  # noqa: SIM115 (open as long as the job runs)
        self.answers: IO[str] = open(name + ".done")  # noqa: SIM115

    def step(self) -> tuple[float, float]:
        """Seconds and loss of the next step."""
        print("step", file=self.calls, flush=True)
        answer = self.answers.readline().split()
        if not answer:
            sys.exit("a job ended; its message is above")
        return float(answer[0]), float(answer[1])

    def close(self) -> None:
        self.calls.close()
        self.process.wait()
        self.answers.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, micro_batches=16)
    parser.add_argument("--placement", default="balanced", help="of the two (parallel.placement)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("this needs two cores")
    with tempfile.TemporaryDirectory() as folder:
        one, two = (Job(world, Path(folder), sys.argv[1:]) for world in (1, 2))
        for _ in range(3):
            (_, first), (_, second) = one.step(), two.step()
            if abs(first - second) > 1e-4:
                sys.exit(f"not the same computation: losses {first} and {second}")
        times = [(one.step()[0], two.step()[0]) for _ in range(options.rounds)]
        one.close()
        two.close()
    for name, values in zip(("one process, one core", "two processes, PP = 2"), zip(*times, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f}")
    middle, low, high = median_interval([alone / (2 * both) for alone, both in times])
    print(f"ratio: efficiency = {middle:.3f} (95 % interval {low:.3f} to {high:.3f}, {len(times)} pairs)")


if __name__ == "__main__":
    main()
