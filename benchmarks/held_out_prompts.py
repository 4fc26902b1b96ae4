"""Prompts that a model cannot know by heart: from held-out files that share no run of 32 tokens with the training files.

    python -m benchmarks.held_out_prompts datasets/python_stdlib prompts.jsonl --count 16 --length 48

writes them as a prompt_file of `mtp_dist.generate`: a JSON string a line.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mtp_dist.config.command import guarded
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.reading import SampleReader
from mtp_dist.data.tokenizer import load_tokenizer
from mtp_dist.errors import UserError

RUN = 32
"""Tokens."""
BLOCK = 256
"""Samples in memory at a time."""


def held_out_prompts(dataset: Dataset, count: int, length: int, *, seed: int = 0) -> list[list[int]]:
    """``count`` prompts of ``length`` tokens, each from another held-out file, at a random place of it.

    Raises UserError where there are not so many such files.
    """
    files = [tokens for tokens in _documents(dataset, "validation") if len(tokens) > length]
    known = [False] * len(files)
    runs = [_runs(tokens) for tokens in files]
    owners: dict[bytes, list[int]] = {}
    for number, found in enumerate(runs):
        for run in found:
            owners.setdefault(run, []).append(number)
    for tokens in _documents(dataset, "train"):
        for run in owners.keys() & _runs(tokens):
            for number in owners[run]:
                known[number] = True
    source = np.random.default_rng(seed)
    unknown = [tokens for tokens, seen in zip(files, known, strict=True) if not seen]
    if len(unknown) < count:
        raise UserError(
            f"{dataset.path}: {len(unknown)} held-out files of more than {length} tokens share no {RUN} tokens with the training "
            f"files, but {count} prompts were asked for; build the dataset with a larger validation_share, or ask for fewer"
        )
    prompts = []
    for number in source.permutation(len(unknown))[:count]:
        begin = int(source.integers(len(unknown[number]) - length))
        prompts.append(unknown[number][begin : begin + length].tolist())
    return prompts


def _runs(tokens: np.ndarray) -> set[bytes]:
    return {tokens[i : i + RUN].tobytes() for i in range(len(tokens) - RUN + 1)}


def _documents(dataset: Dataset, split: str) -> Iterator[np.ndarray]:
    """The tokens of every file, its end-of-document token left out."""
    reader, total = SampleReader(dataset.split(split)), dataset.split(split).documents
    for start in range(0, total, BLOCK):
        for sample in reader.read(start, min(start + BLOCK, total)):
            yield sample.tokens[sample.tokens != dataset.eos_id]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder made by data/build_shards.py")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="tokens")
    options = parser.parse_args()
    dataset = Dataset.open(options.dataset)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    texts = [tokenizer.decode(tokens) for tokens in held_out_prompts(dataset, options.count, options.length)]
    options.out.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
