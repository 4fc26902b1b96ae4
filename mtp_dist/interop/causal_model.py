"""A causal model in a Hugging Face folder (`config.json`, safetensors, `tokenizer.json`), read by `transformers`, which is
optional. Nothing is fetched, and no code of the folder is run."""

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_dist.data.tokenizer import load_tokenizer, vocabulary_size
from mtp_dist.errors import UserError

if TYPE_CHECKING:
    import torch

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def is_causal_model(folder: str | Path) -> bool:
    """Whether a folder is one of Hugging Face's, and no checkpoint or run of ours."""
    return (Path(folder) / CONFIG).is_file()


def require_usable(folder: Path, setting: str, tokenizer: Path) -> None:
    """Raise UserError unless the model of ``folder``, which ``setting`` names, has the tokens of the file ``tokenizer`` under the
    same numbers, and can be read here. Reads no weight."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"{setting}={folder} is a Hugging Face folder, which needs transformers; pip install 'mtp_dist[hf]'")
    try:
        content: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        rows = content.get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{setting}={folder}: {CONFIG} cannot be read ({error})") from None
    if not (folder / TOKENIZER).is_file():
        raise UserError(f"{setting}={folder} has no {TOKENIZER} to compare with the checkpoint's; save the tokenizer there")
    ours, theirs = load_tokenizer(tokenizer), load_tokenizer(folder / TOKENIZER)
    own, other = (each.get_vocab(with_added_tokens=True) for each in (ours, theirs))
    if own != other:
        unlike = sum(other.get(token) != number for token, number in own.items())
        raise UserError(
            f"{setting}={folder} has another tokenizer than the checkpoint ({len(other)} tokens instead of {len(own)}, and "
            f"{unlike} of those are missing or have other numbers); choose a model with the same tokenizer"
        )
    if isinstance(rows, int) and rows < vocabulary_size(ours):
        raise UserError(f"{setting}={folder} has {rows} rows for {vocabulary_size(ours)} tokens; choose one that has them all")


def load_causal_model(folder: Path, setting: str, dtype: "torch.dtype") -> "torch.nn.Module":
    """The model, in evaluation mode on the CPU. Raises UserError where `transformers` cannot read it, or where its memory cannot
    be rolled back."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # an export's MTP modules are no part of the trunk, which is all that drafts
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{setting}={folder} cannot be read as a causal model: {reason[:300]}") from None
    finally:
        logging.set_verbosity(verbosity)
    if not DynamicCache(config=model.config).is_croppable:
        raise UserError(f"{setting}={folder} keeps a state that cannot forget rejected drafts; choose a model of attention alone")
    found: torch.nn.Module = model.eval().requires_grad_(False)
    return found
