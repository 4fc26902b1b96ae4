"""Saving: every rank writes the fragments that it owns, rank 0 commits.

A temporary folder, files forced to the disk, the manifest last, one rename. A save that fails on any rank leaves no trace but a
message, and the last checkpoint stays. No rank gathers the model.
"""

import os
import platform
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

import mtp_dist
from mtp_dist.checkpoint import folder as folders
from mtp_dist.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    TOKENIZER,
    FileRecord,
    FragmentRecord,
    Manifest,
    ParameterRecord,
    file_record,
    sync_path,
)
from mtp_dist.config import compose
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import AgreedError
from mtp_dist.model.parameter import spec_of
from mtp_dist.parallel.engine import Engine
from mtp_dist.parallel.mesh import Mesh

Fragments = list[tuple[str, list[int], FragmentRecord]]


def save(
    root: Path,
    config: TrainingRun,
    mesh: Mesh,
    engine: Engine,
    *,
    step: int,
    progress: dict[str, Any],
    data: dict[str, Any],
    tracker: dict[str, Any],
    tokenizer: Path,
) -> Path:
    """Write `root`/step_N and prune old ones. Collective; only rank 0's progress, data, tracker count.

    Raises AgreedError on every rank if any rank could not write.
    """
    target = root / folders.name_of(step)
    if _agree(lambda: target.exists(), mesh):
        return target
    attempt = [f"{target.name}.tmp-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(attempt, src=0, group=mesh.control)
    temporary = root / attempt[0]
    file, fragments, problem = f"rank_{mesh.rank:05d}.safetensors", [], None
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        fragments = _write_fragments(temporary / file, engine)
        record = file_record(temporary / file)
    except (OSError, SafetensorError) as error:
        record, problem = FileRecord(0, ""), f"{temporary / file}: {getattr(error, 'strerror', None) or error}"
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (file, record, fragments, problem), group=mesh.control)
    problem = next((report[3] for report in reports if report[3]), None)
    if problem is None and mesh.rank == 0:
        try:
            manifest = _manifest(config, reports, engine, step, progress, data, tracker)
            _commit(root, temporary, target, manifest, config, tokenizer)
        except OSError as error:
            problem = f"{temporary}: {error.strerror or error}"
    outcome = [problem]
    dist.broadcast_object_list(outcome, src=0, group=mesh.control)
    if outcome[0] is not None:
        if mesh.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise AgreedError(f"checkpoint of step {step} not written: {outcome[0]}; the last one before it is untouched")
    return target


def _agree(question: Callable[[], bool], mesh: Mesh) -> bool:
    """Rank 0's answer on every rank."""
    answer = [question() if mesh.rank == 0 else None]
    dist.broadcast_object_list(answer, src=0, group=mesh.control)
    return bool(answer[0])


def _write_fragments(path: Path, engine: Engine) -> Fragments:
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    records = []
    for fragment in engine.fragments():
        spec = spec_of(engine.parameters[fragment.name])
        key = f"{fragment.name}@{'x'.join(map(str, spec.start))}+{fragment.begin}"
        for part, value in fragment.parts.items():
            tensors[f"{key}.{part}"] = value.detach().cpu().contiguous()
        place = FragmentRecord(path.name, key, list(spec.start), list(spec.local_shape), fragment.begin, fragment.end)
        records.append((fragment.name, list(spec.shape), place))
    save_file(tensors, path)
    sync_path(path)
    return records


def _manifest(
    config: TrainingRun,
    reports: list[Any],
    engine: Engine,
    step: int,
    progress: dict[str, Any],
    data: dict[str, Any],
    tracker: dict[str, Any],
) -> Manifest:
    parameters: dict[str, ParameterRecord] = {}
    for _, _, fragments, _ in reports:
        for name, shape, place in fragments:
            parameters.setdefault(name, ParameterRecord(shape)).fragments.append(place)
    mtp = config.mtp
    return Manifest(
        step=step,
        progress=progress,
        optimizer={"kind": "AdamW", "step": engine.optimizer_steps},
        contract={"kind": mtp.kind, "depth": mtp.depth, "concat": mtp.concat, "h0": mtp.h0, "recycle": mtp.recycle},
        layout={**asdict(config.parallel), "zero": config.zero.stage, "world": dist.get_world_size()},
        data=data,
        tracker=tracker,
        versions={"mtp_dist": mtp_dist.__version__, "torch": torch.__version__, "python": platform.python_version()},
        parameters=parameters,
        files={file: record for file, record, _, _ in reports},
    )


def _commit(root: Path, temporary: Path, target: Path, manifest: Manifest, config: TrainingRun, tokenizer: Path) -> None:
    compose.save(config, temporary / CONFIG)
    shutil.copyfile(tokenizer, temporary / TOKENIZER)
    for name in (CONFIG, TOKENIZER):
        sync_path(temporary / name)
        manifest.files[name] = file_record(temporary / name)
    for name, record in manifest.files.items():
        # On a folder that nodes do not share, the others' files are not here.
        if not (temporary / name).is_file() or (temporary / name).stat().st_size != record.size:
            raise OSError(f"{name} is not to be seen from rank 0; run_dir must be on a file system that all nodes share")
    manifest.write(temporary / MANIFEST)
    sync_path(temporary)
    os.rename(temporary, target)
    sync_path(root)
    folders.point_latest(root, target)
    folders.prune(root, config.checkpoint)
