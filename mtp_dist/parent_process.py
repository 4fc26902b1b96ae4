"""A process that ends with the one that started it, also where that one was killed by SIGKILL.

The kernel sends a signal to a process whose parent ends (PR_SET_PDEATHSIG; precisely: when the *thread* that forked it ends, so
parents fork from their main thread). What happened before it was asked to is found by looking at the parent afterwards.
Linux only; elsewhere nothing is watched. Source: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
"""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

from mtp_dist.exit_codes import LOST_PEER
from mtp_dist.rank_environment import PARENT

_PR_SET_PDEATHSIG = 1
# Loaded here, not between a fork and an exec.
_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int, number: signal.Signals) -> None:
    """Be sent signal ``number`` when the parent ends, and at once where ``parent`` (0: whichever it is) is no longer it."""
    if not hasattr(_libc, "prctl"):
        return
    _libc.prctl(_PR_SET_PDEATHSIG, int(number))
    if parent and os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_rank_with_parent(number: signal.Signals, environment: Mapping[str, str] = os.environ) -> None:
    """``end_with`` for a rank: its parent is the process that ``MTP_DIST_PARENT`` names, or whatever else started it.

    With SIGKILL while there is nothing to save; with SIGTERM, which makes a rank save and stop, afterwards.
    """
    parent = environment.get(PARENT, "")
    if parent == "0":
        return
    if number == signal.SIGKILL and parent.isdigit() and os.getppid() != int(parent):
        print(f"error: process {parent}, which started this rank, has ended; so does the rank", file=sys.stderr, flush=True)
        os._exit(LOST_PEER)
    end_with(int(parent) if parent.isdigit() else 0, number)
