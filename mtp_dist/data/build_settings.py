"""What `build_shards` settings must satisfy before anything is read: allowed values, and an effect for each that was given."""

from collections.abc import Collection
from typing import Any

from mtp_dist.config.compose import value
from mtp_dist.config.schema import ShardBuild
from mtp_dist.errors import UserError

FIELD_SOURCES = ("jsonl", "parquet", "hf")


def check_settings(config: ShardBuild, typed: Collection[str] = ()) -> None:
    """Raises UserError where a setting has a value that it cannot have, or was given and the others leave it without effect.

    `typed`: dotted keys that were given; those that differ from the default count as given anyway.
    """
    if not config.out:
        raise UserError("out is empty; name the dataset folder to make")
    for key in ("field", "separator", "tokenizer.eos_token"):
        try:
            value(config, key).encode()
        except UnicodeEncodeError:
            raise UserError(f"{key} holds bytes that are not UTF-8; type it again") from None
    if not 0 <= config.validation_share < 1:
        raise UserError(f"validation_share={config.validation_share} must be at least 0 and less than 1")
    if config.shard_mb <= 0:
        raise UserError(f"shard_mb={config.shard_mb} must be more than 0")
    if config.limit_mb < 0:
        raise UserError(f"limit_mb={config.limit_mb} must not be negative; 0 means all")
    if config.workers < 0:
        raise UserError(f"workers={config.workers} must not be negative; 0 means one a core")
    if config.tokenizer.kind not in ("bpe", "bytes", "file"):
        raise UserError(f"tokenizer.kind={config.tokenizer.kind} is unknown; choose bpe, bytes or file")
    if config.tokenizer.kind == "file" and not config.tokenizer.path:
        raise UserError("tokenizer.kind=file needs tokenizer.path, a tokenizer.json")
    if config.tokenizer.kind == "bpe" and config.tokenizer.train_bytes < 1:
        raise UserError(f"tokenizer.train_bytes={config.tokenizer.train_bytes} must be at least 1")
    _require_effect(config, typed)


def _require_effect(config: ShardBuild, typed: Collection[str]) -> None:
    default = ShardBuild()
    for key, needed, way_out in _needs(config):
        given = value(config, key)
        if not needed and (key in typed or given != value(default, key)):
            raise UserError(f"{key}={_shown(given)} has no effect with {way_out}")


def _needs(config: ShardBuild) -> list[tuple[str, bool, str]]:
    """Of each setting that not every build uses: its key, whether this one does, and what to say if not."""
    source, kind = f"source={config.source}", f"tokenizer.kind={config.tokenizer.kind}"
    trained = (config.tokenizer.kind == "bpe", f"{kind}, which is not trained; leave it out, or choose tokenizer=bpe4k")
    from_file = (config.tokenizer.kind == "file", f"{kind}; add tokenizer=file to use a file")
    return [
        ("input", config.source != "python_stdlib", f"{source}; add source=text (or jsonl, parquet, hf)"),
        ("field", config.source in FIELD_SOURCES, f"{source}; it is for source={', '.join(FIELD_SOURCES)}"),
        ("separator", config.source == "text", f"{source}; it is for source=text"),
        ("tokenizer.path", *from_file),
        ("tokenizer.eos_token", *from_file),
        ("tokenizer.vocab_size", *trained),
        ("tokenizer.train_bytes", *trained),
    ]


def _shown(given: Any) -> str:
    return f"[{','.join(map(str, given))}]" if isinstance(given, list) else str(given)
