"""A rank whose peer is gone or hangs: it ends quietly, since the launcher names the one that is the cause.

Its traceback says only which collective it waited in; it is kept in run_dir/failures/rank_N.txt for those who want it.
"""

import contextlib
import logging
import os
import re
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from mtp_dist.exit_codes import LOST_PEER, TIMED_OUT

FOLDER = "failures"
# Gloo raises plain RuntimeErrors; these are its words, and those of torch's store and of NCCL.
_LATE = re.compile(r"[Tt]imed out|[Tt]imeout")
_GONE = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Socket closed|Broken pipe|recvBytes|sendBytes|"
    r"ncclRemoteError|NCCL communicator was aborted"
)
# Of the same classes, but this rank's own trouble: it must be told with its traceback.
_OWN = re.compile(r"ncclUnhandledCudaError|ncclSystemError|ncclInvalid|ncclInternalError|EADDRINUSE|out of memory")


def quiet() -> None:
    """Torch's schedules print every rank's whole table of operations where a send or receive fails; a traceback says it all."""
    logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


def exit_status(error: BaseException) -> int | None:
    """TIMED_OUT or LOST_PEER where the error means that another rank does not answer or is gone, else None."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    distributed = isinstance(error, dist.DistError) or _GONE.search(text) is not None
    if not distributed or _OWN.search(text):
        return None
    return TIMED_OUT if _LATE.search(text) else LOST_PEER


def leave(run_dir: Path, rank: int, error: BaseException, status: int) -> None:
    """End this process at once: a group whose member is gone cannot be left in good order."""
    with contextlib.suppress(OSError):
        (run_dir / FOLDER).mkdir(exist_ok=True)
        (run_dir / FOLDER / f"rank_{rank}.txt").write_text("".join(traceback.format_exception(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
