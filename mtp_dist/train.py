"""Train: ``python -m mtp_dist.train key=value ...``.

Started by hand it composes the settings, checks and freezes them in ``run_dir``, and starts torchrun on this machine. Under
torchrun, or as one of several tasks of srun, it is one process of the job: it takes ``run_dir=`` alone and reads what was frozen
there. Started again in the same folder it resumes. Exit status: see ``exit_codes``; 75 means stopped on request, all saved.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from mtp_dist import exit_codes
from mtp_dist.checkpoint import folder
from mtp_dist.config.attention import choose
from mtp_dist.config.command import application, open_output
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import AgreedError, UserError
from mtp_dist.freezing import changes, check, continued, freeze, frozen, under_launcher
from mtp_dist.launching import start
from mtp_dist.parent_process import end_rank_with_parent
from mtp_dist.run_lock import held, shared
from mtp_dist.slurm_step import adopt
from mtp_dist.standard_streams import survive_closing
from mtp_dist.training.signals import StopRequest, end_at_once, on_one_machine
from mtp_dist.training.status import FINISHED, STOPPED, read_status

EXAMPLES = (
    "python -m mtp_dist.train experiment=quickstart",
    "python -m mtp_dist.train run_dir=runs/one data.path=datasets/mine model=small train.steps=1000 parallel=v2",
    "python -m mtp_dist.train run_dir=runs/one    (go on with the run's own settings)",
    "python -m mtp_dist.train run_dir=runs/one optim.lr=1e-4 parallel=data2    (go on with these two changed)",
)


def launch(config: TrainingRun) -> int:
    """Freeze the run and start its processes on this machine. The first node holds the run folder until they have ended."""
    survive_closing()
    full = check(config)
    if full.launch.node_rank != 0:
        return start(full)
    with held(full.run_dir):
        for line in changes(full):
            print(line, flush=True)
        freeze(full)
        return 0 if _finished(full) else start(full)


def _finished(config: TrainingRun) -> bool:
    """Whether the last step was trained and its checkpoint is sound. Says so first: to read a large one takes a while."""
    run_dir, total = Path(config.run_dir), config.train.steps
    state = read_status(run_dir)
    newest = folder.complete(run_dir / "checkpoints")[-1:]
    if state is None or state.state != FINISHED or not newest or total is None or folder.step_of(newest[0]) < total:
        return False
    print(f"{run_dir} is finished: step {state.step} of {total}; its newest checkpoint is {newest[0]}", flush=True)
    try:
        sound = folder.sound(newest[0])
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return False
    print(f"nothing to train; train.steps=N goes on to a later step, and it is read by checkpoint={sound}", flush=True)
    return True


def work(argv: list[str]) -> int:
    """One process of the job; returns its exit status."""
    stop = StopRequest()
    if on_one_machine():
        end_at_once()
    else:
        stop.install()
    config = frozen(argv)
    adopt(config.launch)
    with shared(config.run_dir) if os.environ["RANK"] == "0" else nullcontext():
        return _train(config, stop)


def _train(config: TrainingRun, stop: StopRequest) -> int:
    # Torch and DeepSpeed are imported only here: bad input is answered before.
    import torch

    from mtp_dist.model.attention import capability
    from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
    from mtp_dist.training import lost_peer
    from mtp_dist.training.trainer import Trainer, make_deterministic

    lost_peer.quiet()
    torch.set_num_threads(config.launch.threads or int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = choose_device(config.launch.device)
    try:
        choose(config.model, config.train, device.type, capability(device))
    except UserError as error:  # launch.device=auto left it open until now; every rank finds the same
        raise AgreedError(str(error)) from None
    if config.train.deterministic:
        make_deterministic(device)
    connect(device, config.parallel.timeout_minutes)
    try:
        trainer = Trainer(config, build_mesh(config.parallel, device), stop)
        try:
            stop.install()
            end_rank_with_parent(signal.SIGTERM)  # from here on there is something to save
            state = trainer.run()
        finally:
            trainer.close()
        disconnect()
    except RuntimeError as error:
        status = lost_peer.exit_status(error)
        if status is None:
            raise
        lost_peer.leave(Path(config.run_dir), int(os.environ["RANK"]), error, status)
    # torchrun takes any other status for a failure and ends the ranks that still leave; there launching.start says it.
    return exit_codes.STOPPED if state == STOPPED and "TORCHELASTIC_RUN_ID" not in os.environ else 0


def main() -> None:
    """The command line."""
    if not under_launcher():
        application("train", TrainingRun, launch, shortcut=continued, command="python -m mtp_dist.train", examples=EXAMPLES)
        return
    open_output()
    end_rank_with_parent(signal.SIGKILL)
    survive_closing()
    try:
        sys.exit(work(sys.argv[1:]))
    except UserError as error:
        if not isinstance(error, AgreedError) or os.environ.get("RANK") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(exit_codes.BAD_INPUT)


if __name__ == "__main__":
    main()
