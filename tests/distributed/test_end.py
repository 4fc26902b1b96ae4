"""Promise: a signal to any rank ends the run in good order, with a status of its own; a rank that dies or hangs ends the job,
with one line that names it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mtp_dist.elastic_agent import cause
from mtp_dist.exit_codes import LOST_PEER, STOPPED, TIMED_OUT
from mtp_dist.tracking.jsonl import read_records
from mtp_dist.training.lost_peer import FOLDER, exit_status
from tests.distributed.pool import ROOT
from tests.distributed.ranks import Ranks, freeze, output, settings
from tests.distributed.test_kill import wait_for_step

LAYOUT = "pp2_zbv"
ENDLESS = 100_000


def endless(run_dir: Path, data: Path, **overrides: Any) -> Path:
    """A run that only a signal ends."""
    return freeze(settings(LAYOUT, data, run_dir, ENDLESS, checkpoint__every_steps=0, **overrides))


def last_step(run: Path) -> int:
    found = read_records(run / "metrics.jsonl")
    return int(found[-1]["step"]) if found else 0


def test_a_signal_to_any_rank_saves_and_stops_all(tmp_path: Path, tiny_dataset: Path) -> None:
    run = endless(tmp_path / "run", tiny_dataset)
    for number, rank in ((signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGUSR1, 1)):
        ranks = Ranks(run)
        wait_for_step(run, last_step(run) + 2, ranks)
        ranks.kill(rank, number)
        assert ranks.wait() == [STOPPED, STOPPED], output(run)
        saved = (run / "checkpoints" / "latest").read_text().strip()
        assert saved == f"step_{last_step(run):08d}"
        assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    steps = [record["step"] for record in read_records(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_ranks_give_up_on_one_that_hangs(tmp_path: Path, tiny_dataset: Path) -> None:
    """Stopped by SIGSTOP: alive, its connections open, and silent."""
    run = endless(tmp_path / "run", tiny_dataset, parallel__timeout_minutes=0.25)
    ranks = Ranks(run)
    wait_for_step(run, 2, ranks)
    ranks.kill(1, signal.SIGSTOP)
    ranks.processes[0].join(100)
    assert ranks.processes[0].exitcode == TIMED_OUT, output(run)
    ranks.kill(1)
    assert "Traceback" not in output(run)
    assert "Traceback" in (run / FOLDER / "rank_0.txt").read_text()


def launched(run: Path, **environment: str) -> tuple[subprocess.Popen[str], dict[int, psutil.Process]]:
    """The run as a user starts it, and its ranks, when they have trained a step."""
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), f"run_dir={run}"]
    launcher = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
    while last_step(run) < 2:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if "mtp_dist.train" in process.cmdline() and "mtp_dist.elastic_agent" not in process.cmdline():
            found[int(process.environ()["RANK"])] = process
    assert sorted(found) == [0, 1]
    return launcher, found


def test_a_rank_that_is_killed_is_named_in_the_one_line_that_is_said(tmp_path: Path, tiny_dataset: Path) -> None:
    run = endless(tmp_path / "run", tiny_dataset)
    launcher, ranks = launched(run)
    ranks[1].kill()
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    said = [line for line in errors.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(said) == 1, errors
    assert said[0].startswith(f"error: rank 1 was killed by signal 9 (SIGKILL; process {ranks[1].pid} on ")


@pytest.mark.full
def test_a_rank_that_hangs_is_named(tmp_path: Path, tiny_dataset: Path) -> None:
    run = endless(tmp_path / "run", tiny_dataset, parallel__timeout_minutes=0.25)
    launcher, ranks = launched(run, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
    ranks[0].suspend()
    _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 1
    said = [line for line in errors.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(said) == 1, errors
    assert said[0].startswith(f"error: rank 0 (process {ranks[0].pid} on ")
    assert "did not answer within parallel.timeout_minutes" in said[0]


def failure(exitcode: int, seen: int) -> ProcessFailure:
    made = ProcessFailure(0, 4711, exitcode, "no such file")
    made.timestamp = seen
    return made


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: (LOST_PEER, 5), 1: (-9, 5), 2: (-15, 6)}, "rank 1 was killed by signal 9 (SIGKILL; process 4711 on host)"),
        ({0: (LOST_PEER, 5), 1: (1, 7)}, "rank 1 failed (exit status 1, process 4711 on host)"),
        ({0: (LOST_PEER, 5), 1: (LOST_PEER, 5)}, "the ranks on host lost a rank of another node"),
        ({0: (TIMED_OUT, 5), 1: (LOST_PEER, 5), 2: (-9, 35)}, "rank 2 (process 4711 on host) did not answer"),
        ({0: (-6, 5), 1: (-11, 5)}, "rank 1 was killed by signal 11 (SIGSEGV;"),
    ],
)
def test_the_cause_is_not_a_rank_that_ended_because_of_another(codes: dict[int, tuple[int, int]], expected: str) -> None:
    assert cause({rank: failure(*seen) for rank, seen in codes.items()}, "host").startswith(expected)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:26338"), LOST_PEER),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation"), TIMED_OUT),
        (dist.DistBackendError("NCCL error: remote process exited, ncclRemoteError"), LOST_PEER),
        (dist.DistBackendError("NCCL error, ncclUnhandledCudaError: Call to CUDA function failed"), None),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), None),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), None),
        (KeyError("gloo/transport"), None),
    ],
)
def test_only_the_loss_of_a_peer_is_passed_over_in_silence(error: Exception, status: int | None) -> None:
    assert exit_status(error) == status
