"""Text from a checkpoint: ``python -m mtp_dist.generate checkpoint=runs/quickstart prompt='def main('``.

``decode.mode=both`` decodes each prompt plainly and speculatively, and compares. Texts and a table go to the standard output,
notes and progress to the standard error. One process holds the whole model, unless ``parallel.`` asks for a layout; see
``generation_job``.
"""

import json
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.manifest import CONFIG, TOKENIZER
from mtp_dist.config import versions
from mtp_dist.config.command import application
from mtp_dist.config.compose import load
from mtp_dist.config.heads import modules
from mtp_dist.config.layout import world_size
from mtp_dist.config.schema import DecodeConfig, Generation, TrainingRun
from mtp_dist.config.validation import validate_launch
from mtp_dist.decoding import request
from mtp_dist.errors import UserError
from mtp_dist.freezing import under_launcher
from mtp_dist.parent_process import end_rank_with_parent
from mtp_dist.standard_streams import say
from mtp_dist.training.signals import end_at_once

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from tokenizers import Tokenizer
    from torch import device, dtype, nn

    from mtp_dist.checkpoint.reader import Checkpoint
    from mtp_dist.data.encoder import TextEncoder
    from mtp_dist.decoding.comparison import Continuation
    from mtp_dist.decoding.draft_lengths import DraftLengths
    from mtp_dist.decoding.engine import Generated, Growing, NewText
    from mtp_dist.decoding.layout import ModelPart
    from mtp_dist.decoding.stopping import StopStrings
    from mtp_dist.model.chunk import Chunk

MODES = {"plain": ["plain"], "speculative": ["speculative"], "both": ["plain", "speculative"]}
WARM_UP_TOKENS = 8
TURN = 4
"""Batches that modes take turns by: a batch that nobody joins any more becomes slow, so it must not be one each."""
EXAMPLES = (
    "python -m mtp_dist.generate checkpoint=runs/quickstart prompt='def main('",
    "python -m mtp_dist.generate checkpoint=runs/quickstart prompt='import os' decode.mode=both decode.draft=3",
    "python -m mtp_dist.generate checkpoint=runs/quickstart prompt_file=prompts.txt decode=sampling output=texts.json",
    "python -m mtp_dist.generate checkpoint=runs/quickstart prompt_file=prompts.jsonl decode.batch=8 'decode.stop=[def]'",
    "python -m mtp_dist.generate checkpoint=runs/quickstart prompt='class ' stream=true",
    "python -m mtp_dist.generate checkpoint=runs/quickstart interactive=true",
    "python -m mtp_dist.generate checkpoint=runs/a prompt='class ' decode.drafter=model decode.draft_model=runs/small",
    "python -m mtp_dist.generate checkpoint=runs/plain prompt='class ' decode.drafter=ngram decode.draft=8",
    "python -m mtp_dist.generate checkpoint=runs/big prompt='class ' parallel.pipeline=4 parallel.tensor=2",
)


@dataclass(frozen=True)
class Prompt:
    """One of those that the command is given. Its number seeds the sampling, so that its text does not depend on the others."""

    number: int
    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Writer:
    """A loaded model, what turns its tokens into text and text into tokens, and how to decode. ``quiet``: without a bar of the
    progress."""

    model: "Chunk | ModelPart"
    draft_model: "nn.Module | None"
    lengths: "DraftLengths | None"
    tokenizer: "Tokenizer"
    encoder: "TextEncoder"
    stops: "StopStrings"
    decode: DecodeConfig
    seed: int
    quiet: bool = False

    @property
    def told(self) -> dict[str, Any]:
        """What the engine is told with every text: the end-of-document token, the tokenizer's size, who else drafts."""
        from mtp_dist.data.tokenizer import vocabulary_size

        entries = vocabulary_size(self.tokenizer)
        return {"end": self.encoder.end_id, "vocabulary": entries, "draft_model": self.draft_model}

    def warm_up(self, prompts: "list[list[int]]") -> None:
        """Threads and kernels start here, so that the first mode is not the one that pays for them."""
        short = replace(self.decode, max_new_tokens=min(self.decode.max_new_tokens, WARM_UP_TOKENS))
        for mode in MODES[self.decode.mode]:
            list(self._written([Prompt(0, "", tokens) for tokens in prompts], replace(short, mode=mode)))

    def write(
        self, prompts: "Sequence[Prompt]", heard: "Callable[[Growing], object] | None" = None
    ) -> "Iterator[Continuation]":
        """Continue prompts in every mode, ``decode.batch`` side by side: the continuations in order, each once it and those
        before it have ended. Several modes take turns, so that they meet the same machine. ``heard`` is called as texts of the
        last mode grow."""
        from mtp_dist.decoding.comparison import Continuation

        *others, last = MODES[self.decode.mode]
        turn = TURN * self.decode.batch if self.decode.batch > 1 else 1
        size = turn if others else max(len(prompts), 1)
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            before = {mode: list(self._written(part, replace(self.decode, mode=mode))) for mode in others}
            for row, result in enumerate(self._written(part, replace(self.decode, mode=last), heard)):
                found = {mode: rows[row] for mode, rows in before.items()} | {last: result}
                texts = {mode: self.text(part[row].tokens, each.tokens) for mode, each in found.items()}
                yield Continuation(part[row].text, part[row].tokens, found, texts)

    def text(self, prompt: list[int], tokens: list[int]) -> str:
        """A prompt's continuation as text: without the end-of-document token, cut before a stop string."""
        from mtp_dist.decoding.stopping import text_of

        return text_of(tokens, self.stops, prompt)

    def follow(self, tokens: list[int], decode: DecodeConfig, number: int) -> "Iterator[tuple[list[int], str]]":
        """Continue one prompt, otherwise decoded than usual: after each forward its new tokens, and why they are the last, if
        they are. ``number`` seeds the sampling."""
        from mtp_dist.decoding.engine import grow

        texts = [self._new(tokens, decode, number)]
        growth = grow(
            self.model,
            lambda _: [texts.pop()] if texts else [],
            decode,
            rows=1,
            longest=len(tokens) + decode.max_new_tokens,
            lengths=self.lengths,
            **self.told,
        )
        for (text,) in growth:
            yield text.latest, text.ending

    def _new(self, tokens: list[int], decode: DecodeConfig, number: int) -> "NewText":
        import torch

        from mtp_dist.decoding.engine import NewText

        generator = torch.Generator(self.model.device).manual_seed(self.seed + number)
        return NewText(tokens, decode.max_new_tokens, self.stops, generator)

    def _written(
        self, prompts: "Sequence[Prompt]", decode: DecodeConfig, heard: "Callable[[Growing], object] | None" = None
    ) -> "Iterator[Generated]":
        from tqdm import tqdm

        from mtp_dist.decoding.engine import continued

        hidden = True if self.quiet or heard is not None else None  # None: shown on a terminal
        with tqdm(total=decode.max_new_tokens * len(prompts), desc=decode.mode, unit="tok", leave=False, disable=hidden) as bar:

            def progress(text: "Growing") -> None:
                bar.update(text.new)
                if heard is not None:
                    heard(text)

            for found in continued(
                self.model,
                [self._new(prompt.tokens, decode, prompt.number) for prompt in prompts],
                decode,
                rows=decode.batch,
                longest=max(len(prompt.tokens) for prompt in prompts) + decode.max_new_tokens,
                lengths=self.lengths if decode.mode == "speculative" else None,
                progress=progress,
                **self.told,
            ):
                bar.clear()
                yield found


def open_writer(config: Generation, prompts: list[str]) -> "tuple[Checkpoint, Writer, list[list[int]]]":
    """The checkpoint, its model ready to write, and the prompts as tokens. Raises UserError before any weight is read."""
    checkpoint, writer = load_writer(config.checkpoint, config.decode, config.seed, device=config.launch.device)
    encoded = encode_prompts(writer.encoder, prompts)
    note_length(encoded, config.decode, checkpoint.config.train.sequence_length)
    return checkpoint, writer, encoded


def encode_prompts(encoder: "TextEncoder", prompts: "Sequence[str]") -> "list[list[int]]":
    """The tokens of each prompt. Raises UserError for one that has none, as a tokenizer may drop spaces."""
    names = [
        f"prompt {number} of {len(prompts)} ({textwrap.shorten(repr(prompt), 60)})" for number, prompt in enumerate(prompts, 1)
    ]
    return [encoder.encode(prompt, name) for prompt, name in zip(prompts, names, strict=True)]


def load_writer(path: str, decode: DecodeConfig, seed: int, *, device: str = "auto") -> "tuple[Checkpoint, Writer]":
    """The checkpoint of a setting, and its model ready to write. Raises UserError before any weight is read; where folders do not
    fit, before torch is loaded."""
    found = folder.sound(path)
    decode = request.fitted(decode, load(found / CONFIG, TrainingRun).mtp)
    drafting = draft_folder(decode, found)
    say(f"note: loading {found}")
    import torch

    from mtp_dist.checkpoint.reader import Checkpoint
    from mtp_dist.data.encoder import TextEncoder
    from mtp_dist.data.tokenizer import load_tokenizer
    from mtp_dist.decoding.draft_lengths import DraftLengths
    from mtp_dist.decoding.drafters import draft_length
    from mtp_dist.decoding.preparation import prepare, require_tools
    from mtp_dist.decoding.stopping import StopStrings

    checkpoint = Checkpoint(found)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    encoder = TextEncoder.of_run(checkpoint.tokenizer_path, checkpoint.config.tokenizer.eos_token)
    if decode.threads:
        torch.set_num_threads(decode.threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("launch.device=cuda, but torch sees no GPU here; choose launch.device=cpu (or auto)")
    dtype, place = getattr(torch, decode.dtype), "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    require_tools(decode, place)
    model = prepare(checkpoint.load_model(dtype).to(place), decode)
    draft_model = None if drafting is None else load_draft_model(drafting, decode, dtype, place)
    most = draft_length(replace(decode, mode="speculative"), model.depth)
    lengths = DraftLengths(most) if decode.auto and decode.mode != "plain" else None
    stops = StopStrings(tokenizer, decode.stop)
    return checkpoint, Writer(model, draft_model, lengths, tokenizer, encoder, stops, decode, seed)


def run(config: Generation) -> int:
    """The command. Raises UserError before any weight is read where the settings, the prompts or the checkpoint do not fit."""
    versions.check()
    request.validate(config)
    validate_launch(config.launch, config.parallel)
    if config.interactive:
        return _converse(config)
    if world_size(config.parallel) > 1:
        from mtp_dist.generation_job import start

        return start(config)
    prompts = request.read_prompts(config)
    checkpoint, writer, encoded = open_writer(config, prompts)
    items = continue_prompts(config, writer, numbered(prompts, encoded))
    finish(config, checkpoint, items)
    return 0


def numbered(prompts: "Sequence[str]", encoded: "Sequence[list[int]]") -> "list[Prompt]":
    """Texts and their tokens, counted."""
    return [Prompt(number, *each) for number, each in enumerate(zip(prompts, encoded, strict=True))]


def continue_prompts(config: Generation, writer: Writer, prompts: "list[Prompt]", *, show: bool = True) -> "list[Continuation]":
    """The prompts, continued; unless not to be shown, texts are printed in order, each once those before it have ended, or
    as it comes."""
    if not prompts:
        return []
    writer.warm_up([prompt.tokens for prompt in prompts[: config.decode.batch]])
    streamed = config.stream and show
    items: list[Continuation] = []
    heard = _streaming(config, writer, prompts) if streamed else None
    for prompt, item in zip(prompts, writer.write(prompts, heard), strict=True):
        items.append(item)
        if show and not streamed:
            print_text(config, writer, item, prompt.number, len(prompts))
    return items


def _streaming(config: Generation, writer: Writer, prompts: "list[Prompt]") -> "Callable[[Growing], None]":
    """Prints texts that come one after the other, piece by piece."""
    from mtp_dist.decoding.marked_text import marked, wants_color
    from mtp_dist.decoding.stopping import TextStream

    stream, color = TextStream(writer.tokenizer, writer.stops), wants_color(config.color, sys.stdout)

    def show(text: "Growing") -> None:
        nonlocal stream
        if len(text.tokens) == text.new:  # its first
            stream = TextStream(writer.tokenizer, writer.stops, text.text.prompt)
            print(f"--- {_title(text.number, len(prompts))}\n{prompts[text.number].text}", end="")
        drafts = text.drafts[len(text.drafts) - text.new :]
        print(marked(stream, text.latest, drafts) if color else stream.feed(text.latest), end="", flush=True)
        if text.ending:
            print(stream.finish(), flush=True)

    return show


def finish(config: Generation, checkpoint: "Checkpoint", items: "Sequence[Continuation]") -> None:
    """The numbers of all texts, printed, and written where the settings say."""
    from mtp_dist.decoding.comparison import summary
    from mtp_dist.decoding.marked_text import LEGEND, wants_color

    if wants_color(config.color, sys.stdout) and config.decode.mode != "plain":
        print(LEGEND)
    print(f"--- {_description(request.fitted(config.decode, checkpoint.config.mtp), checkpoint)}")
    print(summary(items, config.decode), flush=True)
    if blank := sum(not text.strip() for item in items for text in item.texts.values()):
        total = sum(len(item.texts) for item in items)
        print(f"note: {blank} of {total} continuations {'is' if blank == 1 else 'are'} white space alone", file=sys.stderr)
    if config.output:
        _write_json(config, checkpoint, items)


def _converse(config: Generation) -> int:
    from mtp_dist.repl import converse

    checkpoint, writer = load_writer(config.checkpoint, config.decode, config.seed, device=config.launch.device)
    return converse(writer, checkpoint.config.train.sequence_length, config.prompt)


def draft_folder(decode: DecodeConfig, checkpoint: Path) -> Path | None:
    """The sound checkpoint, or the Hugging Face folder, that decode.draft_model means, if one is to draft, and for this
    tokenizer. Raises UserError."""
    if decode.drafter != "model" or decode.mode == "plain":
        return None
    from mtp_dist.data.dataset import file_sha256
    from mtp_dist.interop.causal_model import is_causal_model, require_usable

    if is_causal_model(decode.draft_model):
        if decode.tree != "none":
            raise UserError(
                f"decode.tree={decode.tree} needs a draft model of this project, and decode.draft_model={decode.draft_model} is a"
                " Hugging Face folder; choose decode.tree=none"
            )
        require_usable(Path(decode.draft_model), "decode.draft_model", checkpoint / TOKENIZER)
        return Path(decode.draft_model)
    found = folder.sound(decode.draft_model, "decode.draft_model")
    own, other = (file_sha256(each / TOKENIZER) for each in (checkpoint, found))
    if own != other:
        raise UserError(
            f"decode.draft_model={decode.draft_model} has another tokenizer (sha256 {other[:12]}) than the checkpoint "
            f"({own[:12]}); choose one that was trained on the same dataset"
        )
    return found


def load_draft_model(folder: Path, decode: DecodeConfig, kind: "dtype", place: "device | str") -> "nn.Module":
    """The model of a ``draft_folder``. Raises UserError where it cannot be read."""
    from mtp_dist.checkpoint.reader import Checkpoint
    from mtp_dist.decoding.preparation import prepare
    from mtp_dist.interop.causal_model import is_causal_model, load_causal_model

    if is_causal_model(folder):
        return load_causal_model(folder, "decode.draft_model", kind).to(place)
    return prepare(Checkpoint(folder).load_model(kind).to(place), decode)


def note_length(prompts: list[list[int]], decode: DecodeConfig, trained: int) -> None:
    """Say where texts may grow longer than what the model was trained on."""
    longest = max(len(tokens) for tokens in prompts) + decode.max_new_tokens
    if longest > trained:
        print(f"note: texts may reach {longest} tokens; the model was trained on rows of {trained}", file=sys.stderr)


def _title(number: int, total: int) -> str:
    return f"prompt {number + 1} of {total}"


def print_text(config: Generation, writer: Writer, item: "Continuation", number: int, total: int) -> None:
    """A prompt with its continuation; one for each mode only where they differ. Accepted drafts are marked, where they may be."""
    from mtp_dist.decoding.marked_text import marked, wants_color
    from mtp_dist.decoding.stopping import TextStream

    title, color = _title(number, total), wants_color(config.color, sys.stdout)
    results = dict(list(item.results.items())[-1:]) if item.identical else item.results
    for mode, result in results.items():
        print(f"--- {title}" + (f", {mode}" if len(results) > 1 else ""))
        text = item.texts[mode]
        if color:
            stream = TextStream(writer.tokenizer, writer.stops, item.prompt_tokens)
            text = marked(stream, result.tokens, result.drafts) + stream.finish()
        print(item.prompt + text, flush=True)


def _description(decode: DecodeConfig, checkpoint: "Checkpoint") -> str:
    parts = [f"step {checkpoint.step}", decode.dtype]
    if decode.temperature == 0:
        parts.append("greedy")
    else:
        parts.append(f"temperature {decode.temperature:g}")
        parts += [f"top-k {decode.top_k}"] if decode.top_k else []
        parts += [f"top-p {decode.top_p:g}"] if decode.top_p < 1 else []
    if decode.mode != "plain":
        from mtp_dist.decoding.drafters import draft_length, most_nodes

        mtp = checkpoint.config.mtp
        heads = f"{modules(mtp)} MTP module" + ("s" if modules(mtp) > 1 else "")
        drafters = {"heads": heads, "ngram": "lookup in the text", "model": decode.draft_model}
        fast = replace(decode, mode="speculative")
        most = draft_length(fast, mtp.depth)
        parts += ["typical acceptance (lossy)"] if decode.verify == "typical" else []
        tree = "" if decode.tree == "none" else f"{decode.tree} trees of {most_nodes(fast, mtp.depth)} nodes, depth "
        parts.append(f"drafts of {tree}{'0 to ' if decode.auto else ''}{most} by {drafters[decode.drafter]}")
    return ", ".join(parts)


def _write_json(config: Generation, checkpoint: "Checkpoint", items: Sequence["Continuation"]) -> None:
    from mtp_dist.decoding.comparison import speedup, totals

    columns = totals(items)
    content = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "seed": config.seed,
        "decode": asdict(config.decode),
        "prompts": [item.as_dict() for item in items],
        "total": {mode: statistics.as_dict() for mode, statistics in columns.items()},
        "speedup": speedup(columns),
    }
    try:
        Path(config.output).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output={config.output} cannot be written: {error.strerror}") from None


def main() -> None:
    """The command line."""
    if not under_launcher():
        application("generate", Generation, run, examples=EXAMPLES)
    from mtp_dist.generation_job import main as process

    end_rank_with_parent(signal.SIGKILL)
    end_at_once()
    sys.exit(process(sys.argv[1:]))


if __name__ == "__main__":
    main()
