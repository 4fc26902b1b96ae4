"""From a frozen run to processes on this machine, by torchrun.

``torchrun_command`` and ``process_environment`` are pure; ``start`` runs the command as a child, so that a signal can be answered
well: torchrun itself would kill its processes 30 seconds after it, which may be less than a checkpoint takes. Here the first
SIGTERM or SIGINT goes straight to the processes, as SIGTERM (save and stop); a second one kills them and torchrun. A SIGUSR1 goes
to the processes. A SIGINT that was ignored on entry stays so, as shells want it of what they start in the background. Source: https://docs.pytorch.org/docs/stable/elastic/run.html
"""

import contextlib
import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import psutil

from mtp_dist import exit_codes
from mtp_dist.config.layout import Job, processes_per_node
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.quantity import counted
from mtp_dist.training.status import was_stopped

RENDEZVOUS_PORT = 29400
# SIGTERM when the parent dies: a job must not live on without the one who passes it its signals.
_PR_SET_PDEATHSIG = 1


def torchrun_command(config: Job, module: str, arguments: list[str]) -> list[str]:
    """The command that starts this node's processes, each running ``python -m module arguments``.

    One node: a rendezvous of its own on a free port, or ``launch.master_port``. Several nodes: the static rendezvous, which takes
    the nodes in the order of ``launch.node_rank``; every node runs the same command with its own rank.
    """
    launch = config.launch
    command = [sys.executable, "-m", "mtp_dist.elastic_agent", f"--nproc-per-node={processes_per_node(config)}"]
    if launch.nodes == 1 and launch.master_port == 0:
        # Without --local-addr the machine's own name must resolve, which is not so on many laptops and in many containers.
        command += ["--standalone", "--local-addr=127.0.0.1"]
    else:
        command += [
            f"--nnodes={launch.nodes}",
            f"--node-rank={launch.node_rank}",
            f"--master-addr={launch.master_addr}",
            f"--master-port={launch.master_port or RENDEZVOUS_PORT}",
        ]
    return [*command, "-m", module, *arguments]


def process_environment(
    config: Job, cores: int, cuda_devices: int, outer: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the processes of one node: ``outer`` with the threads and the accelerator of ``launch``.

    ``cores``: CPU cores that this node may use. ``cuda_devices``: GPUs that torch sees. Raises UserError when they do not fit.
    """
    environment = dict(outer)
    processes = processes_per_node(config)
    environment["OMP_NUM_THREADS"] = str(config.launch.threads or threads_of_each(config, cores, outer))
    device = config.launch.device
    if device == "cuda" and not cuda_devices:
        raise UserError("launch.device=cuda, but torch sees no GPU here; choose launch.device=cpu (or auto)")
    if device == "cpu" or not cuda_devices:
        environment["DS_ACCELERATOR"] = "cpu"
    elif processes > cuda_devices:
        raise UserError(
            f"{counted(processes, 'process', 'processes')} on this node, but it has {counted(cuda_devices, 'GPU')} and each "
            "needs one; choose a smaller layout, more launch.nodes, or launch.device=cpu"
        )
    return environment


def threads_of_each(config: Job, cores: int, outer: Mapping[str, str]) -> int:
    """CPU threads of a process where none are asked for: OMP_NUM_THREADS of ``outer``, else an equal share of ``cores``."""
    given = outer.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return max(1, cores // processes_per_node(config))


def start(config: TrainingRun, *, kill_on_second: bool = True) -> int:
    """Run this node's share of a prepared run, and return torchrun's exit status (128 + n when signal n ended it), or STOPPED
    where the run was asked to stop and has saved."""
    command = torchrun_command(config, "mtp_dist.train", [f"run_dir={config.run_dir}"])
    status = run_child(command, node_environment(config), kill_on_second=kill_on_second)
    return exit_codes.STOPPED if status == 0 and was_stopped(Path(config.run_dir)) else status


def start_module(config: Job, module: str, arguments: list[str]) -> int:
    """Run this node's share of the processes of any entry point, each with the same arguments; returns as ``start``."""
    return run_child(torchrun_command(config, module, arguments), node_environment(config))


def node_environment(config: Job) -> dict[str, str]:
    """``process_environment`` of this machine."""
    devices = 0 if config.launch.device == "cpu" else _cuda_devices()
    return process_environment(config, available_cores(), devices, os.environ)


def environment_alone(config: Job) -> dict[str, str]:
    """``node_environment`` of a process that is a world of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**node_environment(config), **own}


def run_child(command: list[str], environment: Mapping[str, str], *, kill_on_second: bool = True) -> int:
    """Run torchrun as a child of this process, passing on signals as the module says, and return its exit status.

    ``kill_on_second`` False is for a launcher above that repeats its signals and ends by itself what does not end in time.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # A session of its own: else Ctrl-C would reach the processes twice, from the terminal and from here.
    child = subprocess.Popen(
        command,
        env=dict(environment),
        start_new_session=True,
        preexec_fn=lambda: _die_with_parent(libc),
    )
    asked = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            if kill_on_second:
                _kill(child)
        elif _signal_processes(child.pid, signal.SIGTERM):
            print("stopping: the processes save and stop; once more to end them at once", file=sys.stderr, flush=True)
        else:
            child.send_signal(signal.SIGTERM)

    def notify(number: int, frame: FrameType | None) -> None:
        _signal_processes(child.pid, signal.SIGUSR1)

    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGUSR1: notify}
    heard = [number for number in handlers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handlers[number]) for number in heard}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status


def _signal_processes(torchrun: int, number: signal.Signals) -> bool:
    """Send a signal to each process that torchrun has started; False when there is none yet."""
    try:
        processes = psutil.Process(torchrun).children()
    except psutil.NoSuchProcess:
        return False
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    return bool(processes)


def _kill(torchrun: subprocess.Popen[bytes]) -> None:
    """End torchrun and everything below it. Its processes have sessions of their own, so no group holds them all."""
    with contextlib.suppress(psutil.NoSuchProcess):
        # Stopped, it cannot start another one in the meantime.
        torchrun.send_signal(signal.SIGSTOP)
        for process in psutil.Process(torchrun.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    torchrun.kill()


def _die_with_parent(libc: ctypes.CDLL) -> None:
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cuda_devices() -> int:
    if importlib.metadata.version("torch").endswith("+cpu"):
        return 0
    # Imported here: every check of settings comes before, and must not wait for torch.
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
