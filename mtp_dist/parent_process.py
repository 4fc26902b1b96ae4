"""A process that ends with the one that started it, also where that one was killed by SIGKILL.

The kernel sends a signal to a process whose parent ends (PR_SET_PDEATHSIG; precisely: when the *thread* that forked it ends, so
parents of ours fork from their main thread). What happened before it was asked to is found by looking at the parent afterwards.
Of parents that somebody else wrote (Slurm's, another torchrun) the threads are not known: there a thread looks every second.
Source: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

from mtp_dist.exit_codes import LOST_PEER
from mtp_dist.rank_environment import PARENT

LOOK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_number = signal.SIGTERM
_watcher: threading.Thread | None = None
# Loaded here, not between a fork and an exec.
_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int, number: signal.Signals) -> None:
    """Be sent signal ``number`` when the parent ends, and at once where ``parent`` is no longer it. Linux; elsewhere nothing."""
    if not hasattr(_libc, "prctl"):
        return
    _libc.prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_foreign(number: signal.Signals) -> None:
    """``end_with`` for a parent of which nothing is known. Called again, it changes the signal."""
    global _number, _watcher
    _number = number
    if _watcher is None:
        _watcher = threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True)
        _watcher.start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), _number)


def end_rank_with_parent(number: signal.Signals, environment: Mapping[str, str] = os.environ) -> None:
    """Let a rank end with its parent: the process that ``MTP_DIST_PARENT`` names, or whatever else started it.

    With SIGKILL while there is nothing to save; with SIGTERM, which makes a rank save and stop, afterwards.
    """
    parent = environment.get(PARENT, "")
    if parent == "0":
        return
    if not parent.isdigit():
        end_with_foreign(number)
        return
    if number == signal.SIGKILL and os.getppid() != int(parent):
        print(f"error: process {parent}, which started this rank, has ended; so does the rank", file=sys.stderr, flush=True)
        os._exit(LOST_PEER)
    end_with(int(parent), number)
