"""The settings of a checkpoint's run, config.yaml, held against what its manifest says of the parameters. No torch.

A model is built from these settings before its first weight is read: ``layers: 1000000000`` must be noticed here.
"""

from pathlib import Path

from mtp_dist.checkpoint.manifest import CONFIG, Manifest, damaged, read_manifest
from mtp_dist.config import compose
from mtp_dist.config.heads import modules
from mtp_dist.config.resolution import head_dim
from mtp_dist.config.schema import TrainingRun
from mtp_dist.config.validation import validate_model
from mtp_dist.errors import UserError


def load_settings(checkpoint: Path, manifest: Manifest | None = None) -> TrainingRun:
    """Raises UserError where they cannot be read, DamagedError where they describe another model than the manifest does."""
    config = compose.load(checkpoint / CONFIG, TrainingRun)
    found = read_manifest(checkpoint) if manifest is None else manifest
    try:
        validate_model(config.model, None)
    except UserError as error:
        raise damaged(checkpoint, f"{CONFIG}: {error}") from None
    model, mtp = config.model, config.mtp
    layers, modules_there = _numbers(found, "layers"), _numbers(found, "mtp")
    if len(layers) != model.layers or max(layers) != model.layers - 1:
        raise damaged(checkpoint, f"{CONFIG} has model.layers={model.layers}, the manifest {len(layers)} layers")
    shapes = {
        "embedding.weight": [model.vocab_size, model.hidden],
        "layers.0.attention.query.weight": [model.heads * head_dim(model), model.hidden],
        "layers.0.attention.key.weight": [model.kv_heads * head_dim(model), model.hidden],
        "layers.0.mlp.gate.weight": [model.mlp, model.hidden],
    }
    for name, shape in shapes.items():
        record = found.parameters.get(name)
        if record is None or record.shape != shape:
            has = "lacks it" if record is None else f"has {record.shape}"
            raise damaged(checkpoint, f"{CONFIG} describes {name} of shape {shape}, the manifest {has}")
    # Of one module for all depths only the depth can be large: no text is that long.
    if modules(mtp) > len(modules_there) or mtp.depth > config.train.sequence_length or mtp.blocks > len(found.parameters):
        raise damaged(
            checkpoint, f"{CONFIG} has mtp.depth={mtp.depth}, mtp.blocks={mtp.blocks}; the manifest holds fewer modules"
        )
    return config


def _numbers(manifest: Manifest, group: str) -> set[int]:
    """Of the blocks ``layers.N`` or modules ``mtp.N`` that have parameters."""
    found = (name.split(".")[1] for name in manifest.parameters if name.startswith(f"{group}."))
    return {int(number) for number in found if number.isdecimal() and len(number) < 10}
