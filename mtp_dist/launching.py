"""From a frozen run to processes on this machine, by torchrun.

``torchrun_command`` and ``process_environment`` are pure; ``start`` runs the command as a child, so that a signal can be answered
well: torchrun itself would kill its processes 30 seconds after it, which may be less than a checkpoint takes. Here the first
SIGTERM, SIGINT or SIGHUP (a closed terminal) goes straight to the processes, as SIGTERM (save and stop); a second one kills them
and torchrun. A SIGUSR1 goes to the processes. A SIGINT or SIGHUP that was ignored on entry stays so, as shells and nohup want it.

Whatever dies, nothing is left: torchrun ends with this process, ranks end with torchrun (``parent_process``), and this process
waits for ranks that have outlived their torchrun to save. Source: https://docs.pytorch.org/docs/stable/elastic/run.html
"""

import contextlib
import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from mtp_dist import exit_codes
from mtp_dist.checkpoint import folder
from mtp_dist.config.layout import Job, processes_per_node, world_size
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.parent_process import end_with
from mtp_dist.quantity import counted
from mtp_dist.rank_environment import PARENT, ignored_place, leave_outer_job, own_variables
from mtp_dist.standard_streams import say, survive_closing
from mtp_dist.training.status import FAILED, FINISHED, KILLED, RUNNING, STOPPED, Status, close_status, read_status

RENDEZVOUS_PORT = 29400
MISSING_SECONDS = 10.0
"""So long a node waits for others before it says so; torchrun itself needs some of them to start."""
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


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
    """The environment of the processes of one node: ``outer`` with the threads and the accelerator of ``launch``, and without
    what an outer launcher has set for processes of its own.

    ``cores``: CPU cores that this node may use. ``cuda_devices``: GPUs that torch sees. Raises UserError when they do not fit.
    """
    environment = own_variables(outer)
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
    """Run this node's share of a prepared run, and return its exit status: 0 finished, STOPPED where it was asked to stop and has
    saved, 128 + n when signal n ended torchrun, else torchrun's own.

    The first node's launcher also sees to it that ``status.json`` does not go on saying ``running``.
    """
    before = read_status(Path(config.run_dir))
    command = torchrun_command(config, "mtp_dist.train", [f"run_dir={config.run_dir}"])
    announce(config)
    outcome = run_child(
        command, node_environment(config), saves=True, kill_on_second=kill_on_second, waiting=_elsewhere(config)
    )
    return _settle(config, before, outcome)


def start_module(config: Job, module: str, arguments: list[str]) -> int:
    """Run this node's share of the processes of any entry point, each with the same arguments; returns torchrun's status."""
    announce(config)
    return run_child(
        torchrun_command(config, module, arguments), node_environment(config), waiting=_elsewhere(config)
    ).status


def announce(config: Job) -> None:
    """Say what is started: the processes need seconds before they say something themselves."""
    survive_closing()
    place = ignored_place(os.environ) if config.launch.nodes == 1 else ""
    if place:
        say(
            f"note: {place} of the environment is not read; for one of several machines give launch.nodes=N "
            "launch.node_rank=R launch.master_addr=ADDRESS"
        )
    here = processes_per_node(config)
    processes = f"{here} process" + ("" if here == 1 else "es")
    elsewhere = _elsewhere(config)
    say(f"starting {processes}" + (f" of {world_size(config.parallel)} ({elsewhere})" if elsewhere else ""))


def _elsewhere(config: Job) -> str:
    """This node's place among several; empty for one."""
    launch = config.launch
    if launch.nodes == 1:
        return ""
    meeting = f"{launch.master_addr}:{launch.master_port or RENDEZVOUS_PORT}"
    return f"node {launch.node_rank} of 0 to {launch.nodes - 1}; all meet at {meeting}"


def _settle(config: TrainingRun, before: Status | None, outcome: "Outcome") -> int:
    """The exit status of a start, by the word of its rank 0; where there is none, the launcher's own word is written."""
    run_dir, after = Path(config.run_dir), read_status(Path(config.run_dir))
    own = None if after is None or (before is not None and after.mark == before.mark) else after
    if own is not None and own.state == STOPPED:
        if outcome.status > 128:
            say(f"the ranks have saved step {own.step}; start it again to go on")
        return exit_codes.STOPPED
    if own is not None and own.state == FINISHED and outcome.status > 128:
        return 0  # what was left to do when it was killed changes nothing
    if outcome.status == 0 or (own is not None and own.state not in (RUNNING, FINISHED)):
        return outcome.status
    saved = folder.complete(run_dir / "checkpoints")
    step = folder.step_of(saved[-1]) if saved else 0
    first = config.launch.node_rank == 0
    if own is None and outcome.stopped:
        # Ranks that train answer a signal by saving; these had not begun.
        if first:
            close_status(run_dir, STOPPED, before, step)
        say(f"stopped while the ranks started: nothing was trained after step {step}; start it again to go on")
        return exit_codes.STOPPED
    if first and (own is None or own.state == RUNNING):
        close_status(run_dir, KILLED if outcome.status > 128 else FAILED, own or before, None if own else step)
    return outcome.status


def node_environment(config: Job) -> dict[str, str]:
    """``process_environment`` of this machine."""
    devices = 0 if config.launch.device == "cpu" else _cuda_devices()
    return process_environment(config, available_cores(), devices, os.environ)


def stand_alone(config: Job) -> None:
    """Make this process a world of its own, whatever job it was started in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, PARENT: "0"}
    environment = node_environment(config)
    leave_outer_job(os.environ)
    os.environ.update({**environment, **own})


@dataclass(frozen=True)
class Outcome:
    """How torchrun ended. ``status``: as a shell has it. ``stopped``: by one request to stop, and not by force."""

    status: int
    stopped: bool = False


class _Torchrun:
    """torchrun as a child of this process, and the ranks below it, also when it is gone."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        parent = os.getpid()
        # Ranks whose torchrun was killed become children of this process, which can then wait for them.
        _adopt_orphans(True)
        # A session of its own: else Ctrl-C would reach the processes twice, from the terminal and from here.
        self.child = subprocess.Popen(
            command,
            env=dict(environment),
            start_new_session=True,
            # A job must not live on without the one who passes it its signals.
            preexec_fn=lambda: end_with(parent, signal.SIGTERM),
        )
        self._orphans: list[psutil.Process] = []
        self._asked = False

    def ranks(self) -> list[psutil.Process]:
        """The processes that torchrun has started and that are there."""
        if self._orphans:
            return [process for process in self._orphans if process.is_running()]
        try:
            return psutil.Process(self.child.pid).children()
        except psutil.NoSuchProcess:
            return []

    def signal_ranks(self, number: signal.Signals) -> bool:
        """Send a signal to each rank; False where there is none yet."""
        found = self.ranks()
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return bool(found)

    def wait(self) -> int:
        """The exit status of torchrun, minus n where signal n ended it, when its ranks have ended, too."""
        status = self.child.wait()
        if status < 0:
            self._orphans = [process for process in psutil.Process().children() if _is_rank_of(process, self.child.pid)]
            if not self._asked:
                say(f"error: torchrun (process {self.child.pid}) was killed by signal {-status}; its ranks end, too")
            psutil.wait_procs(self._orphans)
        return status

    def stop(self) -> None:
        """End torchrun, which has no rank yet."""
        self._asked = True
        self.child.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End torchrun and everything below it. Its processes have sessions of their own, so no group holds them all."""
        self._asked = True
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            # Stopped, it cannot start another one in the meantime.
            self.child.send_signal(signal.SIGSTOP)
            below = psutil.Process(self.child.pid).children(recursive=True)
        for rank in self._orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                below += [rank, *rank.children(recursive=True)]
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.child.kill()


def run_child(
    command: list[str],
    environment: Mapping[str, str],
    *,
    saves: bool = False,
    kill_on_second: bool = True,
    waiting: str = "",
) -> Outcome:
    """Run torchrun as a child of this process, passing on signals as the module says, until it and its ranks have ended.

    ``saves``: its ranks answer a request to stop by saving. ``kill_on_second`` False is for a launcher above that repeats its
    signals and ends by itself what does not end in time. ``waiting``: this node's place among several, for the lines that say
    that others are missing.
    """
    survive_closing()
    torchrun: _Torchrun | None = None
    asked, hung_up = 0, False

    def pass_on() -> None:
        if torchrun is None or asked + hung_up > 1:
            return  # seen below, or passed on before
        if not torchrun.signal_ranks(signal.SIGTERM):
            torchrun.stop()
        else:
            what = "the processes save and stop" if saves else "the processes end"
            say(f"stopping: {what}; once more to end them at once")

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            pass_on()
        elif kill_on_second and torchrun is not None:
            torchrun.kill()

    def hang_up(number: int, frame: FrameType | None) -> None:
        # The kernel, the shell and the session's manager may each send one when a terminal closes; none means: at once.
        nonlocal hung_up
        if not hung_up and not asked:
            hung_up = True
            pass_on()

    def notify(number: int, frame: FrameType | None) -> None:
        if torchrun is not None:
            torchrun.signal_ranks(signal.SIGUSR1)

    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: hang_up, signal.SIGUSR1: notify}
    heard = [number for number in handlers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handlers[number]) for number in heard}
    ended = threading.Event()
    try:
        torchrun = _Torchrun(command, environment)
        if asked or hung_up:
            torchrun.stop()
        if waiting:
            threading.Thread(target=_say_who_is_missing, args=(torchrun, waiting, ended), daemon=True).start()
        status = torchrun.wait()
    finally:
        ended.set()
        _adopt_orphans(False)
        for number, handler in before.items():
            signal.signal(number, handler)
    status = 128 - status if status < 0 else status
    by_signal = status - 128 in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    return Outcome(status, stopped=asked < 2 and by_signal)


def _say_who_is_missing(torchrun: _Torchrun, place: str, ended: threading.Event) -> None:
    """A line after some seconds without ranks, and another one every minute."""
    began = time.monotonic()
    pause = MISSING_SECONDS
    while not ended.wait(pause):
        if torchrun.ranks():
            return
        say(f"waiting for the other nodes ({place}): {time.monotonic() - began:.0f} s")
        pause = 60.0


def _adopt_orphans(on: bool) -> None:
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def _is_rank_of(process: psutil.Process, torchrun: int) -> bool:
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    return "RANK" in environment and environment.get(PARENT) == str(torchrun)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cuda_devices() -> int:
    if importlib.metadata.version("torch").endswith("+cpu"):
        return 0
    # Imported here: every check of settings comes before, and must not wait for torch.
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
