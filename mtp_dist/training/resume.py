"""From a run's checkpoints back to the step after: the newest that verifies, loaded into whatever layout runs now."""

import sys
from pathlib import Path

import torch.distributed as dist

from mtp_dist.checkpoint import folder as folders
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.errors import AgreedError, UserError
from mtp_dist.parallel.mesh import Mesh


def newest_sound(root: Path, mesh: Mesh) -> Checkpoint | None:
    """The newest checkpoint under `root` whose files all verify; None if there is none at all. Collective: ranks share the work.

    Those that do not verify are renamed, so that a later save of their step can take their place. Says on rank 0 which and why.
    Raises UserError where checkpoints exist but none is sound: starting over would bury them.
    """
    names = [[path.name for path in folders.complete(root)[::-1]]]
    dist.broadcast_object_list(names, src=0, group=mesh.control)
    for name in names[0]:
        checkpoint, problem = None, None
        try:
            checkpoint = Checkpoint(root / name)
            problems = checkpoint.damages(mesh.rank, dist.get_world_size())
            problem = problems[0] if problems else None
        except UserError as error:
            problem = str(error)
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem, group=mesh.control)
        problem = next((entry for entry in found if entry), None)
        if problem is None:
            return checkpoint
        if mesh.rank == 0:
            aside = folders.set_aside(root / name)
            print(f"warning: checkpoint {name} is kept as {aside.name} and skipped: {problem}", file=sys.stderr, flush=True)
    if names[0]:
        raise AgreedError(
            f"no checkpoint in {root} is sound ({', '.join(names[0])}); remove them to start over, or choose a new run_dir"
        )
    return None
