"""Start a training run on this machine with torchrun; on several machines, run it on each with its own launch.node_rank.

    python launch/torchrun.py experiment=quickstart
    python launch/torchrun.py run_dir=runs/big parallel.data=8 launch.nodes=2 launch.master_addr=10.0.0.1 launch.node_rank=0 ...

It takes the settings of ``python -m mtp_dist.train``: composes, checks and freezes them in the run folder, then starts processes.
A run that exists goes on with its own settings; those that are typed beside ``run_dir=FOLDER`` lie over them: on the second of
two machines, ``run_dir=FOLDER launch.node_rank=1``.
"""

from mtp_dist.config.command import application
from mtp_dist.config.schema import TrainingRun
from mtp_dist.freezing import continued
from mtp_dist.train import launch

EXAMPLES = (
    "python launch/torchrun.py experiment=quickstart",
    "python launch/torchrun.py run_dir=runs/big data.path=datasets/mine model=1b parallel.data=16 "
    "train.global_batch=64 data.lanes=16 train.steps=1000 launch.nodes=2 launch.master_addr=10.0.0.1 launch.node_rank=0",
)


def main() -> None:
    """The command line."""
    application("train", TrainingRun, launch, shortcut=continued, command="python launch/torchrun.py", examples=EXAMPLES)


if __name__ == "__main__":
    main()
