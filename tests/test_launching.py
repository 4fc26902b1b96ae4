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
from mtp_dist.launching import process_environment, torchrun_command

# Stands for a training process, without the weight of torch: it writes down its place and the signals that it gets.
PROCESS = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
seen = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
names = ("WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR")
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
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(folder: Path, name: str, launcher: subprocess.Popen[str]) -> None:
    while len(list(folder.glob(f"{name}.*"))) < 2:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.05)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_each_process_once_and_gives_it_time(tmp_path: Path, number: signal.Signals) -> None:
    launcher = launched(tmp_path, 0)
    wait_for(tmp_path, "started", launcher)
    launcher.send_signal(signal.SIGUSR1)
    wait_for(tmp_path, "notified", launcher)
    launcher.send_signal(number)
    _, errors = launcher.communicate()
    assert launcher.returncode == 0, errors
    assert "save and stop" in errors
    for rank in range(2):
        assert (tmp_path / f"started.{rank}").read_text() == "2 1 cpu"
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
