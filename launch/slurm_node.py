"""One node's share of a Slurm job: srun starts this once on each node (slurm/train.sbatch.template), and it starts torchrun.

    slurm_node.py RUN_DIR ADDRESS PORT

The settings are those frozen in RUN_DIR; only what Slurm alone knows comes from outside: this node's number (SLURM_NODEID), and
address and port of the rendezvous on the first node. ``RUN_DIR/.launcher-<node>`` holds the id of this process: a SIGTERM to it
makes the node save and stop. At the end it becomes ``RUN_DIR/.ended-<node>``.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from mtp_dist.config.command import guarded
from mtp_dist.config.compose import load
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.exit_codes import STOPPED
from mtp_dist.freezing import resolved_file
from mtp_dist.launching import start
from mtp_dist.parent_process import end_with_foreign
from mtp_dist.run_lock import held

LOCK_SECONDS = 180.0


def node_settings(run_dir: str, address: str, port: str, node: int) -> TrainingRun:
    """The frozen settings with this node's place in the rendezvous. Raises UserError."""
    config = load(resolved_file(run_dir), TrainingRun)
    config.run_dir = run_dir
    config.launch.node_rank = node
    config.launch.master_addr = address
    config.launch.master_port = int(port)
    return config


def run() -> int:
    if len(sys.argv) != 4 or "SLURM_NODEID" not in os.environ:
        raise UserError("slurm_node.py is started by srun, with RUN_DIR ADDRESS PORT; to submit a job: python launch/slurm.py")
    # When Slurm's own process of this step is killed, nobody else ends what it has started.
    end_with_foreign(signal.SIGTERM)
    run_dir, address, port = sys.argv[1:]
    node = os.environ["SLURMD_NODENAME"]
    launcher = Path(run_dir) / f".launcher-{node}"
    launcher.write_text(str(os.getpid()))
    settings = node_settings(run_dir, address, port, int(os.environ["SLURM_NODEID"]))
    # A lost node's lock lives on in a file server for a while.
    lock = held(run_dir, wait_seconds=LOCK_SECONDS) if settings.launch.node_rank == 0 else nullcontext()
    try:
        with lock:
            # Slurm repeats its signals, and kills by itself what does not end.
            status = start(settings, kill_on_second=False)
            # srun would end the other nodes for any other status; the job reads status.json.
            return 0 if status == STOPPED else status
    finally:
        ended = launcher.with_name(f".ended-{node}")
        ended.write_text(str(os.getpid()))
        launcher.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(guarded(run))
