"""torchrun with a last word that a person can use: ``python -m mtp_dist.elastic_agent`` takes torchrun's own arguments.

torchrun ends a failed job with its own traceback, which says nothing of the cause and buries what does. Here one line names the
rank that is the cause: not the first that was seen to end, as its peers end within moments of it, but the one that did not end
because of another (``exit_codes``). What it printed itself stands above. Exit status: 2 if it was told of bad input, 128 + n if
signal n ended the job, else 1.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main

from mtp_dist.exit_codes import BAD_INPUT, LOST_PEER, TIMED_OUT
from mtp_dist.rank_environment import PARENT
from mtp_dist.standard_streams import say, survive_closing

FAILURES = "failures"
"""In a run folder: see ``training.lost_peer``."""

# A rank that trains answers these by saving; one that they end had not begun.
_REQUESTS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1, -signal.SIGHUP)
# How a rank ends because of another: it says so, torchrun ends it, or NCCL's watchdog does.
_BECAUSE_OF_ANOTHER = (LOST_PEER, TIMED_OUT, -signal.SIGTERM, -signal.SIGABRT)
_AGAIN = "started again, the run goes on from its newest checkpoint"


def request(failures: Mapping[int, ProcessFailure]) -> ProcessFailure | None:
    """The rank that a request to stop has ended while the ranks were starting, if that is how they ended."""
    first = min(failure.timestamp for failure in failures.values())
    return next((each for each in failures.values() if each.timestamp == first and each.exitcode in _REQUESTS), None)


def cause(failures: Mapping[int, ProcessFailure], host: str, tracebacks: Path | None = None) -> str:
    """One line on why the ranks of this node ended; `failures` by rank, with the times at which they were seen. `tracebacks`: the
    folder that holds those of ranks that lost another, if there is one."""
    first = min(failure.timestamp for failure in failures.values())
    late = {rank for rank, failure in failures.items() if failure.timestamp > first}
    codes = {failure.exitcode for failure in failures.values()}
    # torchrun had to kill, after its patience, what heard neither its peers nor a SIGTERM.
    hung = [rank for rank in late if failures[rank].exitcode == -signal.SIGKILL]
    # Gloo's ranks say that they timed out; NCCL's are ended by its watchdog.
    if TIMED_OUT in codes or (hung and -signal.SIGABRT in codes):
        names = ", ".join(f"rank {rank} (process {failures[rank].pid} on {host})" for rank in sorted(hung))
        who = names or "a rank that is not among those of this node, or ended meanwhile,"
        return f"{who} did not answer within parallel.timeout_minutes and was given up; {_AGAIN}"
    own = [rank for rank, failure in failures.items() if failure.exitcode not in _BECAUSE_OF_ANOTHER]
    # A rank with an error of its own may end after its peers; one that was killed late, torchrun has killed.
    own = [rank for rank in own if rank not in late or failures[rank].exitcode != -signal.SIGKILL]
    if not own:
        where = f"; their tracebacks are in {tracebacks}" if tracebacks is not None else ""
        return f"the ranks on {host} lost a rank of another node, or were ended from outside{where}; {_AGAIN}"
    rank = min(own, key=lambda rank: (rank in late, rank))
    failure = failures[rank]
    place = f"process {failure.pid} on {host}"
    if failure.exitcode < 0:
        reason = f"was killed by signal {-failure.exitcode} ({failure.signal_name()}; {place})"
        memory = "; the kernel does that where memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        return f"rank {rank} {reason}{memory}; {_AGAIN}"
    return f"rank {rank} failed (exit status {failure.exitcode}, {place}); its own report is above"


def _tracebacks(since: float) -> Path | None:
    """The folder of tracebacks of the run that these ranks train, where this start has left some."""
    run_dir = next((word.removeprefix("run_dir=") for word in sys.argv if word.startswith("run_dir=")), "")
    found = Path(run_dir) / FAILURES
    if not run_dir or not any(path.stat().st_mtime >= since - 1 for path in found.glob("rank_*.txt")):
        return None
    return found


def _unstarted(error: Exception) -> str:
    """One line on why torchrun could not start ranks."""
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "in use" in text:
        return f"the rendezvous port is taken ({text[:200]}); choose another launch.master_port"
    if isinstance(error, (RendezvousError, dist.DistError, TimeoutError)):
        return (
            f"the nodes did not meet ({type(error).__name__}: {text[:200]}); start all of them with the same launch.nodes, "
            "launch.master_addr and launch.master_port, each with its own launch.node_rank"
        )
    return f"torchrun failed ({type(error).__name__}: {text[:300]})"


def run() -> int:
    """Run torchrun on this process's arguments; returns the exit status."""
    survive_closing()
    logging.disable(logging.ERROR)  # torchrun's own account of what the last line says
    began = time.time()
    os.environ[PARENT] = str(os.getpid())
    host = socket.gethostname()
    try:
        main()
    except ChildFailedError as error:
        if any(failure.exitcode == BAD_INPUT for failure in error.failures.values()):
            return BAD_INPUT  # it said why
        asked = request(error.failures)
        if asked is not None:
            return 128 - asked.exitcode
        say(f"error: {cause(error.failures, host, _tracebacks(began))}")
        return 1
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except Exception as error:
        say(f"error: {_unstarted(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
