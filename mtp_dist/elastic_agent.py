"""torchrun with a last word that a person can use: ``python -m mtp_dist.elastic_agent`` takes torchrun's own arguments.

torchrun ends a failed job with its own traceback, which says nothing of the cause and buries what does. Here one line names the
process that failed first; what that process printed stands above it. Exit status: 2 if it was told of bad input, 128 + n if
signal n ended the job, else 1.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

BAD_INPUT = 2


def run() -> int:
    """Run torchrun on this process's arguments; returns the exit status."""
    logging.disable(logging.ERROR)  # torchrun's own account of what the last line says
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == BAD_INPUT:
            return BAD_INPUT  # it said why
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        what = f"rank {rank} failed first ({how}, process {failure.pid}); its own report is above"
        print(f"error: {what}", file=sys.stderr, flush=True)
        return 1
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(run())
