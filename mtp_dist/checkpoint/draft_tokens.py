"""draft_tokens.json: the tokens among which a run's heads draft (`mtp.draft_vocabulary`), ascending. It lies beside a run's
settings and in each of its checkpoints, so that neither a resume nor a decoder asks the dataset. No torch.

Chosen once for a run, where its settings are frozen: those of its own checkpoints, or of the heads that it starts from, else the
most frequent of the training split. Heads of a checkpoint without the file (the first versions wrote none) know the first n.
"""

import json
import os
from pathlib import Path

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.compatibility import kept_heads
from mtp_dist.checkpoint.manifest import DRAFT_TOKENS, read_manifest
from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.config.schema import TrainingRun
from mtp_dist.data.dataset import Dataset
from mtp_dist.errors import UserError
from mtp_dist.json_document import parsed, typed
from mtp_dist.regular_file import MIB, read_regular

LARGEST = 16 * MIB
"""Of the file; a token takes at most ten bytes of it."""


def drafted(config: TrainingRun) -> list[int] | None:
    """The tokens of a run that is frozen; None: its heads know all. Raises UserError where the file is missing or another's."""
    way_out = "remove it and start the run without torchrun: its checkpoints, or else its data, give it anew"
    return None if config.mtp.draft_vocabulary is None else _read(Path(config.run_dir) / DRAFT_TOKENS, config, way_out)


def of_checkpoint(path: Path, config: TrainingRun) -> list[int] | None:
    """As ``drafted``, of a checkpoint of these settings."""
    number = config.mtp.draft_vocabulary
    if number is None:
        return None
    if DRAFT_TOKENS not in read_manifest(path).files:
        return list(range(number))
    return _read(path / DRAFT_TOKENS, config, "use another checkpoint")


def choose(config: TrainingRun) -> None:
    """Write those of a resolved run into its folder; if they are there, only check them. Raises UserError."""
    place = Path(config.run_dir) / DRAFT_TOKENS
    if config.mtp.draft_vocabulary is None:
        return
    if place.exists():
        drafted(config)
        return
    tokens = _inherited(config)
    if tokens is None:
        # Here, so that a run without such a setting needs no numpy.
        from mtp_dist.data.token_counts import most_frequent, token_counts

        tokens = most_frequent(token_counts(Dataset.open(config.data.path)), config.mtp.draft_vocabulary)
    temporary = place.with_name(f".{DRAFT_TOKENS}.{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(tokens) + "\n", encoding="utf-8")
    temporary.replace(place)


def _inherited(config: TrainingRun) -> list[int] | None:
    """Those of the run's newest checkpoint, else of the heads that it starts from."""
    for path in folder.complete(Path(config.run_dir) / "checkpoints")[-1:]:
        return of_checkpoint(path, config)
    if not config.init.checkpoint:
        return None
    path = Path(config.init.checkpoint)
    saved = load_settings(path)
    return of_checkpoint(path, config) if kept_heads(saved, config) else None


def _read(path: Path, config: TrainingRun, way_out: str) -> list[int]:
    try:
        tokens = typed(parsed(read_regular(path, LARGEST)), list[int])
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{path} cannot be read ({str(error)[:200]}); {way_out}") from None
    number, rows = config.mtp.draft_vocabulary, config.model.vocab_size or 0
    if not all(0 <= token < rows for token in tokens) or len(set(tokens)) != number:
        raise UserError(f"{path} does not hold mtp.draft_vocabulary={number} different tokens below {rows}; {way_out}")
    return tokens
