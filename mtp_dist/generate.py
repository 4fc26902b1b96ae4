"""Text from a checkpoint: ``python -m mtp_dist.generate checkpoint=runs/quickstart prompt='def main('``.

``decode.mode=both`` decodes each prompt plainly and speculatively, and compares. Texts and a table go to the standard output,
notes and progress to the standard error.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_dist.config import versions
from mtp_dist.config.command import application
from mtp_dist.config.heads import modules
from mtp_dist.config.schema import DecodeConfig, Generation
from mtp_dist.decoding import request
from mtp_dist.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from tokenizers import Tokenizer

    from mtp_dist.checkpoint.reader import Checkpoint
    from mtp_dist.decoding.comparison import Continuation
    from mtp_dist.decoding.engine import Generated
    from mtp_dist.model.chunk import Chunk

MODES = {"plain": ["plain"], "speculative": ["speculative"], "both": ["plain", "speculative"]}
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Writer:
    """A loaded model, what turns its tokens into text, and how to decode."""

    model: "Chunk"
    tokenizer: "Tokenizer"
    decode: DecodeConfig
    seed: int

    def warm_up(self, prompt: list[int]) -> None:
        """Threads and kernels start here, so that the first mode is not the one that pays for them."""
        short = replace(self.decode, max_new_tokens=min(self.decode.max_new_tokens, WARM_UP_TOKENS))
        for mode in MODES[self.decode.mode]:
            self._generate(prompt, replace(short, mode=mode), self.seed)

    def write(self, prompt: str, tokens: list[int], number: int) -> "Continuation":
        """Continue one prompt in every mode. Sampling is seeded by its number, so that its text does not depend on the others."""
        from mtp_dist.decoding.comparison import Continuation

        results = {}
        for mode in MODES[self.decode.mode]:
            results[mode] = self._generate(tokens, replace(self.decode, mode=mode), self.seed + number)
        texts = {mode: self.text(result.tokens) for mode, result in results.items()}
        return Continuation(prompt, tokens, results, texts)

    def text(self, tokens: list[int]) -> str:
        """Tokens as text, the end-of-document token left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _generate(self, prompt: list[int], decode: DecodeConfig, seed: int) -> "Generated":
        import torch
        from tqdm import tqdm

        from mtp_dist.data.tokenizer import end_of_document, vocabulary_size
        from mtp_dist.decoding.engine import generate

        generator = torch.Generator(self.model.output_weight().device).manual_seed(seed)
        with tqdm(total=decode.max_new_tokens, desc=decode.mode, unit="tok", leave=False, disable=None) as bar:
            return generate(
                self.model,
                prompt,
                decode,
                end=end_of_document(self.tokenizer)[1],
                vocabulary=vocabulary_size(self.tokenizer),
                generator=generator,
                progress=bar.update,
            )


def run(config: Generation) -> int:
    """The command. Raises UserError before any weight is read where the settings, the prompts or the checkpoint do not fit."""
    versions.check()
    request.validate(config)
    prompts = request.read_prompts(config)

    import torch

    from mtp_dist.checkpoint.reader import open_checkpoint
    from mtp_dist.data.tokenizer import text_tokenizer
    from mtp_dist.decoding.comparison import summary

    checkpoint = open_checkpoint(config.checkpoint)
    request.validate_heads(config.decode, checkpoint.config.mtp)
    tokenizer = text_tokenizer(checkpoint.tokenizer_path)
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    _note_length(encoded, config.decode, checkpoint.config.train.sequence_length)
    if config.decode.threads:
        torch.set_num_threads(config.decode.threads)
    model = checkpoint.load_model(getattr(torch, config.decode.dtype)).to("cuda" if torch.cuda.is_available() else "cpu")

    writer = Writer(model, tokenizer, config.decode, config.seed)
    writer.warm_up(encoded[0])
    items = []
    for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
        items.append(writer.write(prompt, tokens, number))
        _print_text(items[-1], f"prompt {number + 1} of {len(prompts)}", writer)
    print(f"--- {_description(config.decode, checkpoint)}")
    print(summary(items, config.decode))
    if config.output:
        _write_json(config, checkpoint, items)
    return 0


def _note_length(prompts: list[list[int]], decode: DecodeConfig, trained: int) -> None:
    longest = max(len(tokens) for tokens in prompts) + decode.max_new_tokens
    if longest > trained:
        print(f"note: texts may reach {longest} tokens; the model was trained on rows of {trained}", file=sys.stderr)


def _print_text(item: "Continuation", title: str, writer: Writer) -> None:
    """The prompt with its continuation; one for each mode only where they differ."""
    results = dict(list(item.results.items())[:1]) if item.identical else item.results
    for mode, result in results.items():
        print(f"--- {title}" + (f", {mode}" if len(results) > 1 else ""))
        print(writer.text(item.prompt_tokens + result.tokens), flush=True)


def _description(decode: DecodeConfig, checkpoint: "Checkpoint") -> str:
    parts = [f"step {checkpoint.step}", decode.dtype]
    if decode.temperature == 0:
        parts.append("greedy")
    else:
        parts.append(f"temperature {decode.temperature:g}")
        parts += [f"top-k {decode.top_k}"] if decode.top_k else []
        parts += [f"top-p {decode.top_p:g}"] if decode.top_p < 1 else []
    if decode.mode != "plain":
        mtp = checkpoint.config.mtp
        parts.append(f"drafts of {decode.draft or mtp.depth} by {modules(mtp)} MTP module" + ("s" if modules(mtp) > 1 else ""))
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


if __name__ == "__main__":
    application(
        "generate",
        Generation,
        run,
        examples=[
            "python -m mtp_dist.generate checkpoint=runs/quickstart prompt='def main('",
            "python -m mtp_dist.generate checkpoint=runs/quickstart prompt='import os' decode.mode=both decode.draft=3",
            "python -m mtp_dist.generate checkpoint=runs/quickstart prompt_file=prompts.txt decode=sampling output=texts.json",
        ],
    )
