"""What a checkpoint or a dataset holds: ``python -m mtp_dist.inspect PATH``; how two checkpoints differ:
``python -m mtp_dist.inspect PATH OTHER``.

Needs no processes, and torch only to compare values or to read documents. Exit status 1 where a file is damaged.
"""

from pathlib import Path

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.description import compare, damages, describe
from mtp_dist.config.command import application
from mtp_dist.config.schema import Inspection
from mtp_dist.data import description as dataset_description
from mtp_dist.data.manifest import MANIFEST as DATASET
from mtp_dist.errors import UserError
from mtp_dist.training.status import current

EXAMPLES = (
    "python -m mtp_dist.inspect runs/quickstart",
    "python -m mtp_dist.inspect runs/quickstart/checkpoints/step_00000200 parameters=true verify=false",
    "python -m mtp_dist.inspect datasets/python_stdlib",
    "python -m mtp_dist.inspect runs/one/checkpoints/step_00000100 runs/two/checkpoints/step_00000100",
)


def run(config: Inspection) -> int:
    """The command."""
    if (Path(config.checkpoint) / DATASET).exists():
        return _dataset(config)
    candidates = folder.locate(config.checkpoint)
    state = current(Path(config.checkpoint))
    if state is not None:
        print(f"run {state.state} at step {state.step}" + (f" of {state.total}" if state.total is not None else ""))
    path = candidates[0]
    if len(candidates) > 1:
        print(f"newest of {len(candidates)}: {', '.join(candidate.name for candidate in candidates)}")
    print(describe(path, parameters=config.parameters and not config.other), flush=True)
    found = damages(path) if config.verify else []
    if config.verify:
        print(f"  damaged: {'; '.join(found)}" if found else "  sound: every file has its size and SHA-256")
    if config.other and not found:
        other = folder.locate(config.other, "other")[0]
        if config.verify and (wrong := damages(other)):
            raise UserError(f"other={other} is damaged: {'; '.join(wrong)}")
        print(compare(path, other, all_parameters=config.parameters))
    return 1 if found else 0


def _dataset(config: Inspection) -> int:
    path = Path(config.checkpoint)
    if config.other:
        raise UserError(f"other={config.other}: {path} is a dataset, and only checkpoints can be compared; leave out other")
    if config.parameters:
        raise UserError(f"parameters=true: {path} is a dataset, which has none; leave out parameters")
    print(dataset_description.describe(path))
    found = dataset_description.damages(path) if config.verify else []
    if config.verify:
        print(f"  damaged: {'; '.join(found)}" if found else "  sound: every shard has its SHA-256, every document its tokens")
    return 1 if found else 0


if __name__ == "__main__":
    application("inspect", Inspection, run, paths=("checkpoint", "other"), examples=EXAMPLES)
