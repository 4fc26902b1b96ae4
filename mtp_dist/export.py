"""A checkpoint as a Hugging Face folder: ``python -m mtp_dist.export checkpoint=runs/quickstart out=exported``.

Weights are read from the checkpoint's fragments and written tensor by tensor, so memory holds one of them at a time.
The folder appears complete, by a rename, or not at all. Readers need no line of this project then; docs/export.md shows how.
"""

import json
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.manifest import CONFIG, TOKENIZER, read_manifest, sync_path
from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.config import versions
from mtp_dist.config.command import application
from mtp_dist.config.rules import above, given, one_of
from mtp_dist.config.schema import Export, TrainingRun
from mtp_dist.data.tokenizer import end_of_document, load_tokenizer, vocabulary_size
from mtp_dist.errors import UserError
from mtp_dist.interop import hugging_face, weight_file
from mtp_dist.interop.hugging_face import Renamed

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from torch import Tensor

    from mtp_dist.checkpoint.reader import Checkpoint

EXAMPLES = (
    "python -m mtp_dist.export checkpoint=runs/quickstart out=exported",
    "python -m mtp_dist.export checkpoint=runs/quickstart/checkpoints/step_00000200 out=trunk heads=false dtype=float32",
)


def export(config: Export) -> Path:
    """Write the folder and return it. Raises UserError where the settings, the checkpoint or the disk do not allow it."""
    versions.check()
    given("out", config.out, "FOLDER")
    one_of("format", config.format, ["hf"])
    above("shard_gb", config.shard_gb, 0)
    out = Path(config.out)
    if out.exists():
        raise UserError(f"out={out} exists; choose a new folder, or remove it")
    path = folder.sound(config.checkpoint)
    run = load_settings(path)
    dtype = config.dtype or run.train.dtype
    one_of("dtype", dtype, list(weight_file.SIZES))
    mtp = run.mtp if config.heads else replace(run.mtp, kind="none", depth=0)
    hugging_face.require_expressible(run.model, mtp)
    print(f"exporting {path}", flush=True)
    tensors = hugging_face.renamed(run.model, mtp)
    temporary = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        _write_descriptions(temporary, path, run, hugging_face.model_config(run, mtp, dtype, _end(path, run)[1]))
        _write_weights(temporary, path, tensors, dtype, config.shard_gb)
        for file in temporary.iterdir():
            sync_path(file)
        sync_path(temporary)
        os.rename(temporary, out)
        sync_path(out.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise UserError(f"out={out} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _end(checkpoint: Path, run: TrainingRun) -> tuple[str, int]:
    """Name and number of the end-of-document token."""
    return end_of_document(load_tokenizer(checkpoint / TOKENIZER), run.tokenizer.eos_token)


def _write_descriptions(out: Path, checkpoint: Path, run: TrainingRun, content: dict[str, Any]) -> None:
    eos_token, eos_id = _end(checkpoint, run)
    vocabulary = vocabulary_size(load_tokenizer(checkpoint / TOKENIZER))
    shutil.copyfile(checkpoint / TOKENIZER, out / "tokenizer.json")
    _write_json(out / "config.json", content)
    _write_json(out / "generation_config.json", hugging_face.generation_config(vocabulary, content["vocab_size"], eos_id))
    _write_json(out / "tokenizer_config.json", hugging_face.tokenizer_config(eos_token, run.train.sequence_length))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def shards(tensors: list[Renamed], sizes: dict[str, int], limit: float) -> list[list[Renamed]]:
    """Neighbours together until the next one would pass `limit` bytes; a tensor larger than that has a shard of its own."""
    found: list[list[Renamed]] = []
    room = 0.0
    for tensor in tensors:
        size = sizes[tensor.source]
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(tensor)
        room -= size
    return found


def _write_weights(out: Path, path: Path, tensors: list[Renamed], dtype: str, shard_gb: float) -> None:
    from mtp_dist.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(path)
    recorded = read_manifest(path).parameters
    if missing := [tensor.source for tensor in tensors if tensor.source not in recorded]:
        raise UserError(f"checkpoint {path} has no parameter {missing[0]}: its manifest does not match its {CONFIG}")
    described = {tensor: weight_file.Description(tensor.name, recorded[tensor.source].shape, dtype) for tensor in tensors}
    parts = shards(tensors, {tensor.source: found.size for tensor, found in described.items()}, shard_gb * 1e9)
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        # One shard needs no index, and goes by the name that readers look for first.
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_file.write(out / file, [described[each] for each in part], (_values(checkpoint, each, dtype) for each in part))
        places |= {tensor.name: file for tensor in part}
    if len(parts) > 1:
        total = sum(found.size for found in described.values())
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _values(checkpoint: "Checkpoint", tensor: Renamed, dtype: str) -> "Tensor":
    import torch

    from mtp_dist.parallel.engine import PARTS

    values = checkpoint.read(tensor.source, PARTS[0]).to(getattr(torch, dtype))
    return torch.cat(values.chunk(2, dim=1)[::-1], dim=1) if tensor.exchange else values


def run(config: Export) -> int:
    """The command."""
    out = export(config)
    print(f"written to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    return 0


if __name__ == "__main__":
    application("export", Export, run, examples=EXAMPLES)
