"""What a user asks of ``python -m mtp_dist.generate``, checked before a checkpoint is opened.

No torch here: errors come at once.
"""

import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

from mtp_dist.config.compose import require_numbers
from mtp_dist.config.layout import world_size
from mtp_dist.config.rules import between, given, one_of, whole_text
from mtp_dist.config.schema import DecodeConfig, Generation, MTPConfig
from mtp_dist.decoding.tree_shape import deepest, fault
from mtp_dist.errors import UserError
from mtp_dist.regular_file import MIB, read_regular

PROMPT_BYTES = 64 * MIB
"""Of a prompt_file, at most."""
MODES = ("plain", "speculative", "both")
DRAFTERS = ("heads", "ngram", "model")
DRAFTING = ("sequential", "parallel", "medusa", "notebook", "eagle", "eagle3")
BLIND = ("parallel", "medusa")
AUTO_REACH = 4
"""Drafts that `decode.auto` may choose even of a model of few depths."""
TREES = ("none", "static", "dynamic")
OF_DRAFTS = ("drafter", "draft", "auto", "tree", "tree_nodes", "tree_width", "tree_shape", "draft_model", "ngram", "verify")
OF_TYPICAL = ("typical_epsilon", "typical_delta")
OF_SAMPLING = ("top_k", "top_p")
DTYPES = ("float32", "bfloat16", "float64")


def validate(config: Generation) -> None:
    """Raise UserError at the first setting that no checkpoint could serve."""
    given("checkpoint", config.checkpoint, "RUN_FOLDER")
    if config.interactive:
        _validate_interactive(config)
    elif not config.prompt and not config.prompt_file:
        raise UserError("prompt is empty and no prompt_file is given; give prompt='TEXT', prompt_file=FILE or interactive=true")
    elif config.prompt and config.prompt_file:
        raise UserError(f"prompt is not read beside prompt_file={config.prompt_file}; leave one of them out")
    whole_text("prompt", config.prompt)
    one_of("color", config.color, ("auto", "always", "never"))
    between("seed", config.seed, 0, 2**63 - 1)
    if config.output and not _writable(Path(config.output)):
        raise UserError(f"output={config.output} cannot be written; name a file in a folder that exists")
    validate_decoding(config.decode)
    if not config.interactive:  # there /temperature may follow
        refuse_unread_sampling(config.decode)
    if config.stream and config.decode.mode == "both":
        raise UserError("stream=true shows one text of a prompt; choose decode.mode=plain or speculative, or stream=false")
    if config.stream and config.decode.batch > 1:
        raise UserError(f"stream=true shows one text at a time; choose decode.batch=1, not {config.decode.batch}, or no stream")


def _validate_interactive(config: Generation) -> None:
    for key, taken in (("prompt_file", config.prompt_file), ("output", config.output)):
        if taken:
            raise UserError(f"{key}={taken} is not read with interactive=true; leave it out, or interactive=false")
    if config.color == "always":
        raise UserError("color=always marks drafts in the texts of prompts; leave it out, or interactive=false")
    if config.decode.mode == "both":
        raise UserError("interactive=true shows one text; choose decode.mode=plain or speculative")
    if config.decode.batch > 1:
        raise UserError(f"interactive=true writes one text at a time; choose decode.batch=1, not {config.decode.batch}")
    if (ranks := world_size(config.parallel)) > 1:
        raise UserError(f"interactive=true reads one terminal, and this layout has {ranks} processes; choose parallel=single")


def validate_decoding(decode: DecodeConfig) -> None:
    """Raise UserError at the first rule that the decoding settings break."""
    require_numbers(decode, "decode.")
    one_of("decode.mode", decode.mode, MODES)
    one_of("decode.dtype", decode.dtype, DTYPES)
    one_of("decode.drafter", decode.drafter, DRAFTERS)
    if decode.drafter == "model":
        given("decode.draft_model", decode.draft_model, "RUN_FOLDER")
    elif decode.draft_model:
        raise UserError(f"decode.draft_model={decode.draft_model} is not read by decode.drafter={decode.drafter}; choose model")
    _validate_tree(decode)
    one_of("decode.verify", decode.verify, ("lossless", "typical"))
    if decode.verify == "typical" and decode.temperature == 0:
        raise UserError("decode.verify=typical compares probabilities, and decode.temperature=0 has none; choose decode=sampling")
    if "" in decode.stop:
        raise UserError("decode.stop holds an empty string, which would end every text at once; leave it out")
    for string in decode.stop:
        whole_text("decode.stop", string)
    if decode.int8 and decode.dtype == "float64":
        raise UserError("decode.int8=true has no kernel for decode.dtype=float64; choose bfloat16 or float32")
    _refuse_unread(decode)


def given_of_drafts(decode: DecodeConfig) -> list[str]:
    """The settings, as typed, that say how drafts are made or verified and are not the default."""
    return _given(decode, (*OF_DRAFTS, *OF_TYPICAL))


def refuse_unread_sampling(decode: DecodeConfig) -> None:
    """Raise UserError for settings of sampling where every text is greedy."""
    if decode.temperature == 0:
        _refuse(decode, OF_SAMPLING, "decode.temperature=0 takes the likeliest token; choose a temperature above 0")


def _refuse_unread(decode: DecodeConfig) -> None:
    """Settings that the others leave without effect."""
    if decode.mode == "plain":
        _refuse(decode, (*OF_DRAFTS, *OF_TYPICAL), "decode.mode=plain drafts nothing; choose decode.mode=speculative or both")
    if decode.drafter != "ngram":
        _refuse(decode, ("ngram",), f"decode.drafter={decode.drafter} looks nothing up; choose decode.drafter=ngram")
    if decode.tree == "none":
        _refuse(decode, ("tree_nodes", "tree_width"), "decode.tree=none drafts a chain; choose decode.tree=static or dynamic")
    if decode.tree_shape:
        _refuse(decode, ("tree_nodes", "tree_width"), "decode.tree_shape names every node; leave that out")
    if decode.verify != "typical":
        _refuse(decode, OF_TYPICAL, f"decode.verify={decode.verify} has no such rule; choose decode.verify=typical")


def _refuse(decode: DecodeConfig, names: tuple[str, ...], why: str) -> None:
    for typed in _given(decode, names):
        raise UserError(f"{typed} has no effect: {why}, or leave {typed.partition('=')[0]} out")


def _given(decode: DecodeConfig, names: tuple[str, ...]) -> list[str]:
    default, found = DecodeConfig(), []
    for name in [item.name for item in fields(decode) if item.name in names]:
        if (value := getattr(decode, name)) != getattr(default, name):
            found.append(f"decode.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return found


def validate_layout(config: Generation) -> None:
    """Raise UserError at what several processes cannot do together."""
    parallel, decode = config.parallel, config.decode
    if parallel.sequence_parallel:
        raise UserError(
            "parallel.sequence_parallel=true shares the positions of a row among tensor ranks, and a decoder's pass may have one;"
            " choose parallel.sequence_parallel=false"
        )
    for name in ("int8", "compile"):
        if getattr(decode, name):
            raise UserError(f"decode.{name}=true is for a model in one process; choose decode.{name}=false, or no layout")
    if config.stream and parallel.data > 1:
        raise UserError(f"stream=true shows one text at a time; choose parallel.data=1, not {parallel.data}, or stream=false")


def _validate_tree(decode: DecodeConfig) -> None:
    one_of("decode.tree", decode.tree, TREES)
    if decode.tree_shape and decode.tree != "static":
        raise UserError(f"decode.tree_shape is not read by decode.tree={decode.tree}; choose decode.tree=static, or leave it out")
    if decode.tree_shape and decode.draft is not None:
        raise UserError(f"decode.draft={decode.draft} is not read beside decode.tree_shape, whose paths tell it; leave one out")
    wrong = fault(decode.tree_shape)
    if wrong:
        raise UserError(f"decode.tree_shape {wrong}; write each node's path behind its parent's, such as [[0],[1],[0,0]]")
    if decode.tree != "none" and decode.drafter == "ngram":
        raise UserError(
            f"decode.tree={decode.tree} ranks drafts by probability, and decode.drafter=ngram knows none; choose decode.tree=none"
        )


def validate_heads(decode: DecodeConfig, mtp: MTPConfig) -> None:
    """Raise UserError where drafts are asked of heads that the model has not, or that cannot make them."""
    if decode.mode == "plain" or decode.drafter != "heads":
        return
    if mtp.depth == 0:
        raise UserError(
            f"decode.mode={decode.mode} drafts with MTP heads, and this model has none; choose decode.mode=plain, "
            "decode.drafter=ngram or decode.drafter=model"
        )
    if mtp.stride > 1:
        raise UserError(
            f"decode.mode={decode.mode} needs a draft of each next token, and heads of mtp.stride={mtp.stride} leap over some; "
            "choose decode.mode=plain, decode.drafter=ngram or decode.drafter=model"
        )
    if mtp.kind not in DRAFTING:
        raise UserError(f"decode.drafter=heads, but mtp.kind={mtp.kind} drafts nothing; choose decode.drafter=ngram or model")
    if mtp.kind in BLIND and decode.tree_shape and deepest(decode.tree_shape) > mtp.depth:
        raise UserError(
            f"decode.tree_shape has paths of {deepest(decode.tree_shape)} choices, more than the model's mtp.depth={mtp.depth}: "
            f"heads of mtp.kind={mtp.kind} stand side by side and cannot be recycled; choose paths of at most {mtp.depth}"
        )
    if mtp.kind in BLIND and decode.draft is not None and decode.draft > mtp.depth:
        raise UserError(
            f"decode.draft={decode.draft} is more than the model's mtp.depth={mtp.depth}: heads of mtp.kind={mtp.kind} stand side"
            f" by side and cannot be recycled; choose at most {mtp.depth}"
        )


def fitted(decode: DecodeConfig, mtp: MTPConfig) -> DecodeConfig:
    """The settings for a model with such heads. Raises UserError as ``validate_heads``.

    `decode.auto` may choose drafts beyond D where the last module can be recycled, unless `decode.draft` says how many: an upper
    bound costs a few rounds, and recycled drafts are often the fastest.
    """
    validate_heads(decode, mtp)
    if decode.auto and decode.draft is None and decode.drafter == "heads" and decode.tree == "none" and mtp.kind not in BLIND:
        return replace(decode, draft=max(2 * mtp.depth, AUTO_REACH))
    return decode


def read_prompts(config: Generation) -> list[str]:
    """``prompt``, or those of ``prompt_file``.

    A file whose name ends in .jsonl holds a JSON string a line; empty lines do not count. Of any other file, prompts are the
    texts between lines of three dashes, without the line ends around them. Raises UserError where there is none.
    """
    if not config.prompt_file:
        return [config.prompt]
    path = Path(config.prompt_file)
    if path.exists() and not path.is_file():
        raise UserError(f"prompt_file={config.prompt_file} is not a regular file; name a file of prompts")
    try:
        content = read_regular(path, PROMPT_BYTES).decode("utf-8-sig")  # Windows editors begin a file with a mark that is no text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"prompt_file={config.prompt_file} cannot be read: {reason}") from None
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
        prompts = [_json_prompt(line, f"prompt_file={config.prompt_file} line {number}") for number, line in lines]
        if not prompts:
            raise UserError(f"prompt_file={config.prompt_file} holds no prompt; write a JSON string a line")
        return prompts
    prompts = [text for part in re.split(r"^---[ \t]*$", content, flags=re.MULTILINE) if (text := part.strip("\r\n"))]
    if not prompts:
        raise UserError(f"prompt_file={config.prompt_file} holds no prompt; write texts separated by lines of three dashes")
    return prompts


def _json_prompt(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)
    except (ValueError, RecursionError):
        prompt = None
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f'{place} is not a JSON string of one or more characters, such as "def main("')
    whole_text(place, prompt)
    return prompt


def _writable(path: Path) -> bool:
    return os.access(path.parent, os.W_OK) and path.parent.is_dir() and not path.is_dir()
