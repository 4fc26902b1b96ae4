"""A run's ranks as processes of their own, which a test may kill: each is what torchrun would have started, forked from a process
that has imported everything. Nobody tells the others when one dies."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from mtp_dist.config import compose
from mtp_dist.config.schema import TrainingRun
from mtp_dist.freezing import resolved_file
from mtp_dist.rank_environment import PARENT
from tests.distributed.layouts import configuration
from tests.distributed.pool import CONTEXT

PATIENCE = 120.0
"""Seconds; only a hang takes so long."""


def settings(layout: str, data: Path, run_dir: Path, steps: int, **overrides: Any) -> TrainingRun:
    """A tiny run that saves after every step. `overrides`: ``checkpoint__keep_last=3``."""
    config = configuration(layout, steps=steps, progress=False)
    config.run_dir, config.data.path, config.tracker.wandb = str(run_dir), str(data), "disabled"
    config.model.vocab_size = 265  # the byte tokenizer has 257; odd, so that tensor ranks hold unequal shares
    config.data.block_samples, config.validation.sequences = 4, 5
    config.launch.device, config.launch.threads, config.checkpoint.every_steps = "cpu", 1, 1
    for key, value in overrides.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


class Ranks:
    """Start the ranks of a frozen run. `environment` is theirs; what they print is in run_dir/output.<n>.txt."""

    def __init__(self, run_dir: Path, environment: dict[str, str] | None = None) -> None:
        config = compose.load(resolved_file(run_dir), TrainingRun)
        size = config.parallel.pipeline * config.parallel.data * config.parallel.tensor
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MTP_DIST_FAULT": "", PARENT: "0"}
        self.processes = []
        for rank in range(size):
            variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {})
            process = CONTEXT.Process(target=_rank, args=(str(run_dir), variables), daemon=True)
            process.start()
            self.processes.append(process)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        if self.processes[rank].is_alive():
            os.kill(pid, number)

    def wait(self) -> list[int]:
        """Exit codes (minus the signal). A rank that outlives `PATIENCE` is killed and its code is -SIGALRM: it hung."""
        end, hung = time.monotonic() + PATIENCE, set()
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                hung.add(rank)
                self.kill(rank)
                process.join()
        codes = [process.exitcode for process in self.processes]
        return [-signal.SIGALRM if rank in hung else code for rank, code in enumerate(codes)]  # type: ignore[misc]


def freeze(config: TrainingRun) -> Path:
    run_dir = Path(config.run_dir)
    compose.save(config, resolved_file(run_dir))
    return run_dir


def output(run_dir: Path) -> str:
    """What the ranks of all starts printed."""
    return "".join(path.read_text() for path in sorted(run_dir.glob("output.*.txt")))


def rows_trained(run_dir: Path) -> dict[int, dict[int, list[Any]]]:
    """step -> replica -> [tokens, names of documents] of its rows, as the last start that trained the step read them."""
    found: dict[int, dict[int, list[Any]]] = {}
    for path in sorted(run_dir.glob("rows.*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            step, replica, rows = json.loads(line)
            found.setdefault(step, {})[replica] = rows
    return found


def _rank(run_dir: str, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    log = os.open(f"{run_dir}/output.{variables['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from mtp_dist import train
    from mtp_dist.training.trainer import Trainer

    step_once = Trainer._one_step

    def one_step(self: Trainer) -> bool:
        if self.upcoming is not None:
            batch = self.upcoming[0]
            entry = [self.progress.step + 1, self.mesh.data_rank, [batch.tokens.tolist(), batch.samples]]
            with open(f"{run_dir}/rows.{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        return step_once(self)

    Trainer._one_step = one_step  # type: ignore[method-assign]
    sys.argv = ["train", f"run_dir={run_dir}"]
    train.main()


