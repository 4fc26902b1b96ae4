"""Promise: one job at a time in a run folder, whoever starts it; what a dead process has left behind stops nobody."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_dist.errors import UserError
from mtp_dist.run_lock import NAME, held, require_free, shared
from mtp_dist.training.status import KILLED, RUNNING, STATUS, STOPPED, current, read_status, write_status

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


def test_it_is_said_whether_who_has_the_folder_is_alive(tmp_path: Path) -> None:
    launcher = holder(tmp_path)
    rank = json.loads((tmp_path / NAME).read_text().splitlines()[1])["pid"]
    assert f"launcher: process {launcher.pid} (alive), rank 0: process {rank} (alive)" in refusal(tmp_path)
    launcher.kill()
    launcher.wait()
    assert f"launcher: process {launcher.pid} (ended), rank 0: process {rank} (alive)" in refusal(tmp_path)
    assert launcher.stdin is not None
    launcher.stdin.close()
    with held(tmp_path, wait_seconds=60):
        pass


def test_a_process_that_was_forked_by_a_holder_keeps_nothing(tmp_path: Path) -> None:
    """As a data loader's worker, or a tracker's, that outlives a rank which was killed."""
    code = """
import os, sys, time
from mtp_dist.run_lock import held
with held(sys.argv[1]):
    if (child := os.fork()) == 0:
        print("forked", flush=True)
        time.sleep(3600)
    print(child, flush=True)
    time.sleep(3600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    [child] = said - {"forked"}
    try:
        process.kill()
        process.wait()
        with held(tmp_path):
            assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_full_disk_leaves_the_lock_without_its_words(tmp_path: Path) -> None:
    code = """
import resource, sys
from mtp_dist.run_lock import held, is_held
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
with held(sys.argv[1]):
    print(is_held(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_run_of_which_everything_was_killed_does_not_go_on_saying_that_it_runs(tmp_path: Path) -> None:
    write_status(tmp_path, RUNNING, 7, total=9)
    with held(tmp_path):
        found = current(tmp_path)
        assert found is not None and found.state == RUNNING
    killed = current(tmp_path)
    assert killed is not None and (killed.state, killed.step, killed.total) == (KILLED, 7, 9)
    assert json.loads((tmp_path / STATUS).read_text()) == {"state": "killed", "step": 7, "total": 9}
    write_status(tmp_path, STOPPED, 8)
    assert current(tmp_path) == read_status(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "running"}', '{"state": "running", "step": "many"}', "7"])
def test_a_status_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / STATUS).write_text(content)
    assert current(tmp_path) is None


def test_a_status_is_right_on_a_full_disk_too(tmp_path: Path) -> None:
    write_status(tmp_path, RUNNING, 3, total=1000)
    code = """
import errno, os, pathlib, sys
from mtp_dist.training import status
def full(source, target):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.replace = full
status.write_status(pathlib.Path(sys.argv[1]), "failed", 4)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert json.loads((tmp_path / STATUS).read_text()) == {"state": "failed", "step": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == [STATUS]


def test_asking_leaves_nothing_behind(tmp_path: Path) -> None:
    require_free(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"run_dir={tmp_path / 'file' / 'run'} cannot be written" in refusal(tmp_path / "file" / "run")
