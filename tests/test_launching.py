"""Promise: a prepared run starts the right processes with the right environment, and a signal reaches them once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mtp_dist.config.schema import LaunchConfig, ParallelConfig, TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.exit_codes import STOPPED
from mtp_dist.launching import process_environment, stand_alone, torchrun_command
from mtp_dist.rank_environment import is_torch_rank
from mtp_dist.run_lock import held
from mtp_dist.training.status import read_status

ROOT = Path(__file__).parents[1]

# Stands for a training process, without the weight of torch: it writes down its place and the signals that it gets.
PROCESS = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
seen = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
names = ("WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCHELASTIC_MAX_RESTARTS")
place = " ".join(os.environ.get(name, "-") for name in names)
folder = pathlib.Path(sys.argv[1].removeprefix("run_dir="))
(folder / f"started.{rank}").write_text(place)
while not {"SIGTERM", "SIGINT"} & set(seen):
    time.sleep(0.05)
    if "SIGUSR1" in seen:
        (folder / f"notified.{rank}").touch()
time.sleep(1.0)  # longer than a second signal, sent by mistake, would take
(folder / f"ended.{rank}").write_text(" ".join(seen))
sys.exit(int(sys.argv[2]))
"""


def run(pipeline: int = 1, data: int = 1, **launch: object) -> TrainingRun:
    parallel = ParallelConfig(pipeline=pipeline, data=data)
    return TrainingRun(run_dir="runs/x", parallel=parallel, launch=LaunchConfig(**launch))  # type: ignore[arg-type]


def test_one_node_needs_no_address_and_no_port() -> None:
    command = torchrun_command(run(pipeline=2, data=2), "some.module", ["run_dir=runs/x"])
    assert command[:3] == [sys.executable, "-m", "mtp_dist.elastic_agent"]
    assert {"--nproc-per-node=4", "--standalone"} < set(command)
    assert command[-3:] == ["-m", "some.module", "run_dir=runs/x"]


def test_several_nodes_meet_at_the_first_ones_address() -> None:
    commands = [
        torchrun_command(run(data=4, nodes=2, node_rank=rank, master_addr="10.0.0.1"), "m", []) for rank in range(2)
    ]
    for rank, command in enumerate(commands):
        expected = {"--nproc-per-node=2", "--nnodes=2", f"--node-rank={rank}", "--master-addr=10.0.0.1", "--master-port=29400"}
        assert expected < set(command)
        assert "--standalone" not in command
    assert "--master-port=4000" in torchrun_command(run(master_port=4000), "m", [])


def test_threads_are_shared_out_unless_given() -> None:
    config = run(pipeline=2)
    assert process_environment(config, 8, 0, {})["OMP_NUM_THREADS"] == "4"
    assert process_environment(config, 1, 0, {})["OMP_NUM_THREADS"] == "1"
    assert process_environment(config, 8, 0, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert process_environment(run(threads=5), 8, 0, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "5"


def test_the_accelerator_is_the_gpu_only_where_there_is_one_for_each_process() -> None:
    assert process_environment(run(), 8, 0, {"A": "b"}) == {"A": "b", "OMP_NUM_THREADS": "8", "DS_ACCELERATOR": "cpu"}
    assert "DS_ACCELERATOR" not in process_environment(run(data=2), 8, 2, {})
    assert process_environment(run(device="cpu"), 8, 2, {})["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(UserError, match=r"launch\.device=cuda, but torch sees no GPU"):
        process_environment(run(device="cuda"), 8, 0, {})
    with pytest.raises(UserError, match=r"4 processes .* 2 GPU"):
        process_environment(run(data=4), 8, 2, {})


def test_a_process_that_is_a_world_of_its_own_leaves_the_outer_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation in one process, in a container that an operator made for one rank of many."""
    environment = {"PATH": os.environ["PATH"], **OUTER}
    monkeypatch.setattr(os, "environ", environment)
    stand_alone(run(device="cpu", threads=3))
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert environment["OMP_NUM_THREADS"] == "3"
    assert not [name for name in environment if name.startswith(("TORCHELASTIC", "PET_"))]
    assert is_torch_rank(environment)


# Hears no signal but SIGKILL, and has a process of its own that hears none either.
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
folder = pathlib.Path(sys.argv[1].removeprefix("run_dir="))
(folder / f"pids.{os.environ['RANK']}").write_text(f"{os.getpid()} {child.pid} {os.getppid()}")
(folder / f"started.{os.environ['RANK']}").touch()
while True:
    time.sleep(1)
"""


# What a cluster's operator may have set in a container for a torchrun of its own.
OUTER = {
    "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "5", "PET_RDZV_BACKEND": "etcd", "PET_MAX_RESTARTS": "9",
    "RANK": "1", "WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "9", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "theirs", "TORCHELASTIC_MAX_RESTARTS": "7",
}  # fmt: skip
# As a training process while it starts: no handler of its own, and it ends with torchrun.
STARTING = """
import os, pathlib, signal, sys, time
from mtp_dist.parent_process import end_rank_with_parent
end_rank_with_parent(signal.SIGKILL)
folder = pathlib.Path(sys.argv[1].removeprefix("run_dir="))
(folder / f"pids.{os.environ['RANK']}").write_text(f"{os.getpid()} {os.getppid()}")
(folder / f"started.{os.environ['RANK']}").touch()
time.sleep(3600)
"""


def launched(folder: Path, exit_status: int, process: str = PROCESS) -> subprocess.Popen[str]:
    (folder / "process_of_a_job.py").write_text(process)
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # even where the tests themselves run in the background
from mtp_dist.config.schema import LaunchConfig, ParallelConfig, TrainingRun
from mtp_dist.launching import process_environment, run_child, torchrun_command
config = TrainingRun(parallel=ParallelConfig(pipeline=2), launch=LaunchConfig(threads=1))
command = torchrun_command(config, "process_of_a_job", ["run_dir={folder}", "{exit_status}"])
sys.exit(run_child(command, process_environment(config, 2, 0, os.environ), saves=True).status)
"""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", **OUTER}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(folder: Path, name: str, launcher: subprocess.Popen[str]) -> None:
    while len(list(folder.glob(f"{name}.*"))) < 2:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.05)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_a_stop_reaches_each_process_once_and_gives_it_time(tmp_path: Path, number: signal.Signals) -> None:
    launcher = launched(tmp_path, 0)
    wait_for(tmp_path, "started", launcher)
    launcher.send_signal(signal.SIGUSR1)
    wait_for(tmp_path, "notified", launcher)
    launcher.send_signal(number)
    launcher.send_signal(signal.SIGHUP)  # the terminal closes: no second request
    launcher.send_signal(signal.SIGHUP)
    _, errors = launcher.communicate()
    assert launcher.returncode == 0, errors
    assert errors.count("save and stop") == 1
    for rank in range(2):
        assert (tmp_path / f"started.{rank}").read_text() == "2 1 cpu 0"
        assert (tmp_path / f"ended.{rank}").read_text() == "SIGUSR1 SIGTERM"


@pytest.mark.timeout(120)
def test_a_process_that_fails_makes_the_launcher_fail(tmp_path: Path) -> None:
    launcher = launched(tmp_path, 3)
    wait_for(tmp_path, "started", launcher)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate()
    assert launcher.returncode == 1, errors


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_everything_at_once(tmp_path: Path, number: signal.Signals) -> None:
    launcher = launched(tmp_path, 0, STUBBORN)
    wait_for(tmp_path, "started", launcher)
    pids = {int(pid) for file in tmp_path.glob("pids.*") for pid in file.read_text().split()}
    processes = [psutil.Process(pid) for pid in pids]
    launcher.send_signal(number)
    assert launcher.stderr is not None
    assert "save and stop" in launcher.stderr.readline()
    launcher.send_signal(number)
    launcher.communicate()
    assert launcher.returncode == 128 + signal.SIGKILL
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert len(gone) == 5  # torchrun, and two processes with one of their own each
    assert not alive


def test_an_interrupt_that_was_ignored_stays_so() -> None:
    """As in a script's background job, which its shell stops by SIGTERM alone: Ctrl-C reaches both, and would count twice."""
    code = """
import os, signal, sys
from mtp_dist.launching import run_child
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(run_child([sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGINT)"], os.environ).status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def started(folder: Path, **launch: object) -> subprocess.Popen[str]:
    """The launcher of a run, as ``mtp_dist.train`` starts it, of ranks that never come to train."""
    (folder / "process_of_a_job.py").write_text(STARTING)
    code = f"""
import sys
from mtp_dist import launching
from mtp_dist.config.schema import LaunchConfig, ParallelConfig, TrainingRun
from mtp_dist.run_lock import held
command = launching.torchrun_command
launching.torchrun_command = lambda config, module, arguments: command(config, "process_of_a_job", arguments)
launching.MISSING_SECONDS = 0.2
config = TrainingRun(run_dir="{folder}", parallel=ParallelConfig(data=2), launch=LaunchConfig(threads=1, **{launch!r}))
with held(config.run_dir):
    sys.exit(launching.start(config))
"""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("killed", ["launcher", "torchrun"])
def test_ranks_that_start_end_with_whatever_started_them(tmp_path: Path, killed: str) -> None:
    launcher = started(tmp_path)
    wait_for(tmp_path, "started", launcher)
    pids = {int(pid) for file in tmp_path.glob("pids.*") for pid in file.read_text().split()}
    processes = [psutil.Process(pid) for pid in pids]
    assert len(processes) == 3
    torchrun = next(process for process in processes if process.ppid() == launcher.pid)
    (launcher if killed == "launcher" else torchrun).kill()
    _, errors = launcher.communicate()
    assert psutil.wait_procs(processes, timeout=60)[1] == []
    with held(tmp_path, wait_seconds=60):  # nobody has the folder
        pass
    if killed == "torchrun":
        assert launcher.returncode == 128 + signal.SIGKILL
        assert "Traceback" not in errors
        state = read_status(tmp_path)
        assert state is not None and (state.state, state.step) == ("killed", 0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "launcher"),
        (signal.SIGTERM, "rank"),
        pytest.param(signal.SIGINT, "launcher", marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, "launcher", marks=pytest.mark.full),
        pytest.param(signal.SIGUSR1, "rank", marks=pytest.mark.full),
    ],
)
def test_a_stop_while_ranks_start_is_a_stop(tmp_path: Path, number: signal.Signals, to: str) -> None:
    launcher = started(tmp_path)
    wait_for(tmp_path, "started", launcher)
    if to == "launcher":
        launcher.send_signal(number)
    else:
        os.kill(int((tmp_path / "pids.1").read_text().split()[0]), number)
    _, errors = launcher.communicate()
    assert launcher.returncode == STOPPED, errors
    assert "stopped while the ranks started: nothing was trained after step 0" in errors.splitlines()[-1]
    assert "error" not in errors and "Traceback" not in errors and "failures" not in errors
    state = read_status(tmp_path)
    assert state is not None and (state.state, state.step) == ("stopped", 0)


@pytest.mark.timeout(120)
def test_a_stop_before_there_are_ranks_is_a_stop(tmp_path: Path) -> None:
    launcher = started(tmp_path)
    assert launcher.stderr is not None
    assert launcher.stderr.readline() == "starting 2 processes\n"
    while not psutil.Process(launcher.pid).children():
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate()
    assert launcher.returncode == STOPPED, errors
    assert "nothing was trained" in errors


@pytest.mark.timeout(120)
def test_a_node_that_waits_for_another_says_so(tmp_path: Path) -> None:
    launcher = started(tmp_path, nodes=2, master_port=29467)
    assert launcher.stderr is not None
    assert launcher.stderr.readline() == "starting 1 process of 2 (node 0 of 0 to 1; all meet at 127.0.0.1:29467)\n"
    assert launcher.stderr.readline().startswith("waiting for the other nodes (node 0 of 0 to 1; all meet at 127.0.0.1:29467): ")
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate()
    assert launcher.returncode == STOPPED
