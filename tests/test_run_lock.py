"""Promise: one job at a time in a run folder, whoever starts it; what a dead process has left behind stops nobody."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_dist.errors import UserError
from mtp_dist.run_lock import held, require_free, shared

# A launcher that ends, by its own will or not, while a process that it started goes on.
HOLDER = """
import subprocess, sys
from mtp_dist.run_lock import held
rank = "import sys; from mtp_dist.run_lock import shared\\nwith shared(sys.argv[1]): print('rank', flush=True); sys.stdin.read()"
with held(sys.argv[1]):
    child = subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"rank\\n"
    print("held", flush=True)
    child.wait()
"""


def holder(run_dir: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refusal(run_dir: Path) -> str:
    with pytest.raises(UserError) as caught, held(run_dir):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_start_is_told_who_has_the_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = holder(run_dir)
    for word in (f"run_dir={run_dir}", socket.gethostname(), f"process {first.pid}", "launch.node_rank"):
        assert word in refusal(run_dir)
    # Rank 0 of a job that no launcher of this project has started.
    with pytest.raises(UserError, match=f"process {first.pid}"), shared(run_dir):
        pass
    with pytest.raises(UserError, match=f"process {first.pid}"):
        require_free(run_dir)
    # Another folder is another matter.
    with held(tmp_path / "other"):
        pass
    first.communicate()
    with held(run_dir), shared(run_dir):
        assert f"process {os.getpid()}" in subprocess.run(
            [sys.executable, "-c", f"from mtp_dist.run_lock import *\nwith held({str(run_dir)!r}): pass"],
            capture_output=True, text=True,
        ).stderr


def test_the_folder_is_free_when_launcher_and_rank_0_are_dead_and_not_before(tmp_path: Path) -> None:
    launcher = holder(tmp_path)
    launcher.send_signal(signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    assert f"process {launcher.pid}" in refusal(tmp_path)
    assert launcher.stdin is not None
    launcher.stdin.close()  # rank 0 reads it, and ends
    with held(tmp_path, wait_seconds=60):
        pass


def test_asking_leaves_nothing_behind(tmp_path: Path) -> None:
    require_free(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"run_dir={tmp_path / 'file' / 'run'} cannot be written" in refusal(tmp_path / "file" / "run")
