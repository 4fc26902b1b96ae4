"""What a start begins with: the newest of the run's own checkpoints that verifies, or else another run's weights
(``init.checkpoint``), loaded into whatever layout runs now."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mtp_dist.checkpoint import folder as folders
from mtp_dist.checkpoint.compatibility import kept_heads, require_start
from mtp_dist.checkpoint.manifest import DamagedError, OptimizerRecord, TrackerRecord, damaged
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.heads import modules
from mtp_dist.config.schema import TrainingRun
from mtp_dist.data.stream_state import form
from mtp_dist.errors import AgreedError, UserError
from mtp_dist.json_document import FormError
from mtp_dist.parallel.engine import Engine
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.parallel.parameter_groups import HEADS, TRUNK, role_of
from mtp_dist.training.agreement import together
from mtp_dist.training.progress import Progress


def newest_sound(root: Path, mesh: Mesh) -> Checkpoint | None:
    """The newest checkpoint under `root` whose files all verify; None if there is none at all. Collective: ranks share the work.

    Those that are damaged are renamed, so that a later save of their step can take their place. Says on rank 0 which and why.
    Raises AgreedError where checkpoints exist but none is sound (starting over would bury them), and where one cannot be read for
    another reason (a disk that is away, a later format): that may pass, so nothing is renamed.
    """
    names = [[path.name for path in folders.complete(root)[::-1]]]
    dist.broadcast_object_list(names, src=0, group=mesh.control)
    for name in names[0]:
        checkpoint, problem, hindrance = None, None, None
        try:
            checkpoint = Checkpoint(root / name)
            _require_state(checkpoint)
            problems = checkpoint.damages(mesh.rank, dist.get_world_size())
            problem = problems[0] if problems else None
        except DamagedError as error:
            problem = str(error)
        except UserError as error:
            hindrance = str(error)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (problem, hindrance), group=mesh.control)
        problem = next((entry[0] for entry in found if entry[0]), None)
        hindrance = next((entry[1] for entry in found if entry[1]), None)
        if hindrance is not None:
            raise AgreedError(f"{hindrance}; nothing was changed: mend it, or move {root / name} away, and start again")
        if problem is None:
            return checkpoint
        aside = together(mesh, lambda damaged=root / name: folders.set_aside(damaged) if mesh.rank == 0 else None)  # type: ignore[misc]
        if aside is not None:
            print(f"warning: checkpoint {name} is kept as {aside.name} and skipped: {problem}", file=sys.stderr, flush=True)
    if names[0]:
        raise AgreedError(
            f"no checkpoint in {root} is sound ({', '.join(names[0])}); remove them to start over, or choose a new run_dir"
        )
    return None


def _require_state(checkpoint: Checkpoint) -> None:
    """Raise DamagedError where a section that a resume reads is not of its form. A place that no lane of the dataset has shows
    only where the stream is opened."""
    checkpoint.section("progress", Progress)
    checkpoint.section("optimizer", OptimizerRecord)
    checkpoint.section("tracker", TrackerRecord)
    try:
        form(checkpoint.manifest.data, "data")
    except FormError as error:
        raise damaged(checkpoint.path, str(error)) from None


def warm_start(config: TrainingRun, mesh: Mesh, engine: Engine) -> str:
    """Give a new run the weights of ``init.checkpoint``: the true float32 ones, in whatever layout they were saved. Collective.

    Returns what was taken, in one line. Raises UserError, on all ranks, where the checkpoint is damaged or does not fit.
    """
    given = config.init.checkpoint
    path = folders.locate(given, "init.checkpoint")[0]
    checkpoint = together(mesh, lambda: _verified(path, mesh))
    require_start(path, config)
    kept = kept_heads(checkpoint.config, config)
    there, here = (modules(run.mtp) for run in (checkpoint.config, config))

    def weights(name: str) -> bool:
        # A discriminator starts fresh: it is no part of what is handed on.
        return role_of(name) != HEADS or (name.startswith("mtp.") and int(name.split(".")[1]) <= kept)

    roles = [TRUNK] if config.init.optimizer else []
    if config.init.optimizer and kept == there == here:
        roles.append(HEADS)
    checkpoint.load_engine(engine, weights=weights, moments=roles)
    heads = f"{kept} MTP modules kept, {here - kept} fresh, {there - kept} dropped"
    return f"started from the weights of {path} (step {checkpoint.step}): {heads}"


def _verified(path: Path, mesh: Mesh) -> Checkpoint:
    """Every rank checks its share of the files."""
    checkpoint = Checkpoint(path)
    problems = checkpoint.damages(mesh.rank, dist.get_world_size())
    if problems:
        raise UserError(f"init.checkpoint={path} is damaged ({problems[0]}); give another one")
    return checkpoint
