"""A causal model in a Hugging Face folder (`config.json`, safetensors, `tokenizer.json`), read by `transformers`, which is
optional. Nothing is fetched, and no code of the folder is run."""

import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_dist.data.tokenizer import load_tokenizer, vocabulary_size
from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, parsed, typed
from mtp_dist.regular_file import MIB, open_regular, read_regular, require_regular
from mtp_dist.tensor_header import StoredTensor, read_header

if TYPE_CHECKING:
    import torch

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST = 64 * MIB
"""Of a JSON file of the folder, the tokenizer apart."""


def is_causal_model(folder: str | Path) -> bool:
    """Whether a folder is one of Hugging Face's, and no checkpoint or run of ours."""
    return (Path(folder) / CONFIG).is_file()


def require_usable(folder: Path, setting: str, tokenizer: Path) -> None:
    """Raise UserError unless the model of ``folder``, which ``setting`` names, has the tokens of the file ``tokenizer`` under the
    same numbers, and can be read here. Reads no weight."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"{setting}={folder} is a Hugging Face folder, which needs transformers; pip install 'mtp_dist[hf]'")
    try:
        content = typed(parsed(read_regular(folder / CONFIG, LARGEST), nonfinite=True), dict[str, Any])
        rows = content.get("vocab_size")
    except (OSError, FormError) as error:
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
    stored_tensors(folder, setting)


def load_causal_model(folder: Path, setting: str, dtype: "torch.dtype") -> "torch.nn.Module":
    """The model, in evaluation mode on the CPU. Raises UserError where `transformers` cannot read it, or where its memory cannot
    be rolled back."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # an export's MTP modules are no part of the trunk, which is all that drafts
    stored = stored_tensors(folder, setting)
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _require_described(AutoModelForCausalLM, config, stored)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, keys = loaded
        if missing := sorted(keys["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]}")
    except Exception as error:  # whatever a library comes to with a folder that was made to mislead
        reason = " ".join(str(error).split())
        raise UserError(f"{setting}={folder} cannot be read as a causal model: {reason[:300]}") from None
    finally:
        logging.set_verbosity(verbosity)
    if not DynamicCache(config=model.config).is_croppable:
        raise UserError(f"{setting}={folder} keeps a state that cannot forget rejected drafts; choose a model of attention alone")
    found: torch.nn.Module = model.eval().requires_grad_(False)
    return found


def stored_tensors(folder: Path, setting: str) -> dict[str, StoredTensor]:
    """Every tensor of the weight files by its name. Reads no weight.

    Raises UserError where an entry of the folder is no file, or a link out of it (other than into the Hub's cache, whose
    snapshots are links), and where there are no safetensors, or they cannot be read: pickles are never opened.
    """
    try:
        _require_own_files(folder)
        found: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            with open_regular(folder / file) as content:
                try:
                    found |= read_header(content)
                except FormError as error:
                    raise ValueError(f"{file}: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={folder} cannot be read as a causal model: {str(error)[:300]}") from None
    return found


def _require_own_files(folder: Path) -> None:
    """`transformers` opens what it finds, by name."""
    if (folder / "adapter_config.json").exists():
        raise ValueError("adapter_config.json makes it an adapter of another model; merge the two and save the whole")
    inside = [Path(os.path.realpath(place)) for place in (folder, folder.parent.parent / "blobs")]
    for entry in folder.iterdir():
        if entry.is_dir():
            continue
        require_regular(entry)
        if entry.is_symlink() and not any(Path(os.path.realpath(entry)).is_relative_to(place) for place in inside):
            raise ValueError(f"{entry.name} is a link out of the folder; replace it with the file itself")


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / WEIGHTS_INDEX).exists():
        raise ValueError(f"it has neither {WEIGHTS} nor {WEIGHTS_INDEX}; save the model with safe_serialization")
    index = typed(parsed(read_regular(folder / WEIGHTS_INDEX, LARGEST)), dict[str, Any])
    places = typed(index.get("weight_map"), dict[str, str], f"{WEIGHTS_INDEX}: weight_map")
    for name in places.values():
        if "/" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{WEIGHTS_INDEX} names {name[:80]!r}, which is no weight file of this folder")
    return sorted(set(places.values()))


def _require_described(factory: Any, config: Any, stored: dict[str, StoredTensor]) -> None:
    """Raise ValueError where config.json describes another model than its weights are: it would be built, at any size, and what
    is missing drawn at random."""
    import torch

    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if layers > len(stored):
        raise ValueError(f"{CONFIG} describes {layers} layers, its weights are {len(stored)} tensors")
    with torch.device("meta"):
        model = factory.from_config(config, trust_remote_code=False)
    for name, parameter in model.named_parameters():
        tensor = stored.get(name)
        if tensor is not None and (tensor.shape != list(parameter.shape) or not tensor.dtype.startswith(("F", "BF"))):
            raise ValueError(f"{name} is stored as {tensor.dtype} {tensor.shape}; {CONFIG} describes {list(parameter.shape)}")
    described = sum(parameter.numel() for parameter in model.parameters())
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if described > 2 * held:  # a tied matrix is described twice and stored once
        raise ValueError(f"{CONFIG} describes {described} parameters, its weights have {held}")
