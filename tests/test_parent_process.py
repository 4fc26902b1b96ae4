"""Promise: a rank ends with the process that started it, however that one ends, and whenever."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mtp_dist.exit_codes import LOST_PEER
from mtp_dist.rank_environment import ignored_place, is_torch_rank, own_variables

# Starts one rank and waits to be killed; the rank says when it is armed.
PARENT = """
import os, subprocess, sys, threading, time
rank = '''
import signal, sys, time
from mtp_dist.parent_process import end_rank_with_parent
end_rank_with_parent(signal.SIGKILL)
print("armed", flush=True)
time.sleep(3600)
'''
environment = os.environ | ({"MTP_DIST_PARENT": str(os.getpid())} if sys.argv[1] == "ours" else {})


def start():
    child = subprocess.Popen([sys.executable, "-c", rank], env=environment)
    print(child.pid, flush=True)


if sys.argv[1] == "thread":  # which ends
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
time.sleep(3600)
"""


def parent(kind: str) -> tuple["subprocess.Popen[str]", psutil.Process]:
    process = subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, psutil.Process(int(process.stdout.readline()))


@pytest.mark.parametrize("kind", ["ours", "theirs", "thread"])
def test_a_rank_does_not_outlive_its_parent(kind: str) -> None:
    """Also of a launcher that starts ranks from a thread of its own, which may end before them."""
    process, rank = parent(kind)
    assert process.stdout is not None
    assert process.stdout.readline() == "armed\n"
    assert psutil.wait_procs([rank], timeout=0.2)[0] == []
    process.kill()
    assert psutil.wait_procs([rank], timeout=60)[1] == []
    process.communicate()


def test_a_rank_whose_parent_has_ended_before_ends_at_once() -> None:
    """Killed between the start of the rank and the moment when the kernel was asked: another process is the parent by then."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    code = "import signal; from mtp_dist.parent_process import end_rank_with_parent as end; end(signal.SIGKILL); print('alive')"
    environment = {**os.environ, "MTP_DIST_PARENT": str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (LOST_PEER, "")
    assert done.stderr == f"error: process {gone.pid}, which started this rank, has ended; so does the rank\n"


def test_a_rank_that_trains_is_asked_to_save() -> None:
    code = """
import os, signal, sys, time
from mtp_dist.parent_process import end_with
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append("SIGTERM"))
end_with(os.getppid(), signal.SIGTERM)
print("armed", flush=True)
while not asked:
    time.sleep(0.01)
open(sys.argv[1], "w").write(asked[0])
"""
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, sys.argv[1]])"
    read, write = os.pipe()
    place = f"/proc/{os.getpid()}/fd/{write}"
    process = subprocess.Popen([sys.executable, "-c", outer, place], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "armed\n"
    process.send_signal(signal.SIGKILL)
    assert os.read(read, 7) == b"SIGTERM"
    os.close(read)
    os.close(write)
    process.communicate()


@pytest.mark.parametrize(
    ("outer", "said"),
    [
        ({}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1", "PET_NNODES": "1"}, ""),
        ({"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "job-0"}, "WORLD_SIZE=4 RANK=2"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "PET_NNODES=2 PET_NODE_RANK=0"),
        ({"RANK": "2", "WORLD_SIZE": "4", "MTP_DIST_PARENT": "7"}, ""),
    ],
)
def test_an_operator_that_means_several_machines_is_noticed(outer: dict[str, str], said: str) -> None:
    assert ignored_place(outer) == said


def test_what_an_outer_job_has_set_is_left_behind() -> None:
    kept = {"PATH": "/bin", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90", "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "2", "RANKING": "1"}
    outer = {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": "0", "ROLE_WORLD_SIZE": "2", "ROLE_NAME": "x", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "9", "PET_RDZV_BACKEND": "etcd", "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": "/x", "MTP_DIST_PARENT": "1",
    }  # fmt: skip
    assert own_variables(kept | outer) == kept
    assert not is_torch_rank(kept)


def test_a_closed_pipe_or_a_full_disk_behind_the_console_ends_nothing(tmp_path: Path) -> None:
    code = """
import os, sys
from mtp_dist.standard_streams import survive_closing
survive_closing()
for number in range(3000):
    print("line", number, flush=number % 100 == 0)
    print("to the other one", file=sys.stderr)
if sys.argv[2] == "closed":
    os.write(1, b"from a library, which nobody reads either")
open(sys.argv[1], "a").write("came to its end;")
"""
    ended = tmp_path / "ended"
    command = f"{sys.executable} -c '{code}' {ended}"
    for way in ("closed 2>&1 | head -1", "full > /dev/full 2>&1", "none >&- 2>&-"):
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {way}"], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, ""), way
    assert ended.read_text() == "came to its end;" * 3
