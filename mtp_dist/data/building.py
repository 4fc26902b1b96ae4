"""Build a dataset: documents of a source, tokenised, in shards.

1. Documents are read in the source's order and split by a hash of their names.
2. The tokenizer is made (a BPE learns from the training split only) and written first.
3. Each document becomes its tokens and the end-of-document token, appended to its split's shards.
4. dataset.json is written last, then the folder gets its name. The same settings and input give the same bytes.

Built into <out>.building: an interrupted build leaves nothing that looks complete, and the next one starts afresh.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from mtp_dist.config.schema import ShardBuild
from mtp_dist.data import token_counts
from mtp_dist.data.build_settings import check_settings
from mtp_dist.data.dataset import Dataset, file_sha256
from mtp_dist.data.encoder import TextEncoder
from mtp_dist.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    CountsRecord,
    Manifest,
    SplitRecord,
    TokenizerRecord,
    read_manifest,
    settings_hash,
    token_dtype,
    write_manifest,
)
from mtp_dist.data.shards import SplitWriter
from mtp_dist.data.sources.files import home_expanded
from mtp_dist.data.sources.source import Document, Source, open_source
from mtp_dist.data.tokenizer import (
    byte_tokenizer,
    choose_end,
    end_of_document,
    load_tokenizer,
    train_bpe,
    vocabulary_size,
    with_end,
)
from mtp_dist.data.workspace import building_folder, check_free
from mtp_dist.errors import UserError

TOKENIZER = "tokenizer.json"
MIB = 2**20
BATCH_BYTES = 4 * MIB  # text tokenised at a time
BATCH_DOCUMENTS = 1024
RESERVE = 64 * MIB  # disk that is left alone


def build(config: ShardBuild, note: Callable[[str], object] = print) -> tuple[Dataset, bool]:
    """The dataset at `config.out`, and whether it was built now (False: it was complete already).

    `note` is called with a line on what of the input was not read. Raises UserError where a setting, the input, the disk or what
    lies at `out` does not allow it.
    """
    check_settings(config)
    out = home_expanded(config.out, "out")
    settings = build_settings(config)
    try:
        complete = _complete(out, settings)
    except OSError as error:
        raise UserError(f"out={config.out} cannot be used: {error.strerror}; choose another out=") from None
    if complete:
        return Dataset.open(out), False
    if config.workers:
        # Read by the tokenizers library when it starts its threads.
        os.environ |= {"RAYON_NUM_THREADS": str(config.workers), "TOKENIZERS_PARALLELISM": "true"}
    source = open_source(config)
    check_free(out, _estimate(source, config) + RESERVE)
    with building_folder(out) as folder:
        tokenizer = _make_tokenizer(source, config)
        tokenizer.save(str(folder / TOKENIZER))
        end = end_of_document(tokenizer, choose_end(tokenizer, config.tokenizer.eos_token))
        splits, counts = _write_shards(source, config, folder, end[1])
        _write_manifest(folder, settings, splits, token_counts.save(folder, counts), end)
    for line in source.unread.lines():
        note(line)
    return Dataset.open(out), True


def split_of(name: str, validation_share: float) -> str:
    """The split of a document, by a hash of its name."""
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "validation" if value < validation_share * 2**64 else "train"


def build_settings(config: ShardBuild) -> dict[str, Any]:
    """What decides the content of a dataset; two builds with equal settings and input are equal."""
    tokenizer: dict[str, Any] = {"kind": config.tokenizer.kind}
    if config.tokenizer.kind == "bpe":
        tokenizer |= {"vocab_size": config.tokenizer.vocab_size, "train_bytes": config.tokenizer.train_bytes}
    elif config.tokenizer.kind == "file":
        tokenizer["sha256"] = file_sha256(_tokenizer_file(config)[1])
        if config.tokenizer.eos_token:
            tokenizer["eos_token"] = config.tokenizer.eos_token
    return {
        "source": config.source,
        "input": list(config.input),
        "field": config.field,
        "separator": config.separator,
        "validation_share": config.validation_share,
        "shard_mb": config.shard_mb,
        "limit_mb": config.limit_mb,
        "tokenizer": tokenizer,
    }


def _complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds this very dataset; raises UserError where it holds anything else."""
    if (out / MANIFEST).is_file():
        before = read_manifest(out)
        if before.settings_sha256 == settings_hash(settings):
            return True
        changed = [name for name, value in settings.items() if before.settings.get(name) != value]
        raise UserError(
            f"out={out} holds a dataset built with other settings ({', '.join(changed)}); "
            "choose another out= or delete that folder"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not a dataset; choose another out=")
    return False


def _estimate(source: Source, config: ShardBuild) -> int:
    """Bytes on disk, about, on the safe side: two bytes of tokens a byte of text (what a byte tokenizer takes)."""
    text = source.size()
    if config.limit_mb:
        text = min(text, int(config.limit_mb * MIB))
    return 2 * text


def _tokenizer_file(config: ShardBuild) -> tuple[Tokenizer, Path]:
    """The tokenizer at `tokenizer.path`, its end of a document flagged special, and where it is."""
    path = home_expanded(config.tokenizer.path, "tokenizer.path")
    tokenizer = load_tokenizer(path)
    try:
        return with_end(tokenizer, choose_end(tokenizer, config.tokenizer.eos_token)), path
    except UserError as error:
        raise UserError(f"tokenizer.path={path}: {error}") from None


def _limited(source: Source, limit_mb: float, note: bool = False) -> Iterator[Document]:
    """The documents that are used: none empty (`note`: those are counted as unread), no more once `limit_mb` MiB of text (0: any)
    are out."""
    left = limit_mb * MIB
    for document in source:
        if not document.text:
            if note:
                source.unread.add("documents without text", document.name)
        else:
            yield document
            left -= len(document.text.encode())
            if limit_mb and left <= 0:
                return


def _make_tokenizer(source: Source, config: ShardBuild) -> Tokenizer:
    if config.tokenizer.kind == "bytes":
        return byte_tokenizer()
    if config.tokenizer.kind == "file":
        return _tokenizer_file(config)[0]
    return train_bpe(_training_text(source, config), config.tokenizer.vocab_size)


def _training_text(source: Source, config: ShardBuild) -> Iterator[str]:
    """Text of the training split for a BPE, up to `tokenizer.train_bytes`."""
    left = config.tokenizer.train_bytes
    with _bar("tokenizer", min(left, source.size())) as bar:
        for document in _limited(source, config.limit_mb):
            if split_of(document.name, config.validation_share) == "train":
                yield document.text
                size = len(document.text.encode())
                bar.update(size)
                left -= size
                if left <= 0:
                    return


def _write_shards(source: Source, config: ShardBuild, folder: Path, eos_id: int) -> tuple[dict[str, SplitRecord], np.ndarray]:
    """Tokenise and write all documents; the `splits` entry of dataset.json, and how often each token stands in those of the
    training split, int64 [V]."""
    encoder = TextEncoder(folder / TOKENIZER, eos_id)
    vocabulary = vocabulary_size(load_tokenizer(folder / TOKENIZER))
    dtype, counts = np.dtype(token_dtype(vocabulary)), np.zeros(vocabulary, dtype=np.int64)
    shard_bytes = int(config.shard_mb * MIB)
    writers = {split: SplitWriter(folder, split, shard_bytes, dtype) for split in SPLITS}
    written = 0
    with _bar("shards", source.size()) as bar:
        for batch in _batches(_limited(source, config.limit_mb, note=True)):
            encoded = encoder.encode_batch([document.text for document in batch], [document.name for document in batch])
            learned: list[np.ndarray] = []
            for document, text_tokens in zip(batch, encoded, strict=True):
                tokens = np.append(text_tokens, eos_id).astype(dtype)
                split = split_of(document.name, config.validation_share)
                if writers[split].add(document.name, tokens):
                    check_free(folder, shard_bytes + RESERVE)
                if split == "train":
                    learned.append(tokens)
                bar.update(len(document.text.encode()))
                written += 1
            counts += token_counts.counted(learned, vocabulary)
    if not written:
        raise UserError(f"source={config.source} has no documents with text; name other input")
    return {split: writer.close() for split, writer in writers.items()}, counts


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_BYTES of text."""
    documents = iter(documents)
    while batch := list(islice(documents, 1)):
        size = len(batch[0].text)
        while size < BATCH_BYTES and len(batch) < BATCH_DOCUMENTS and (following := next(documents, None)):
            batch.append(following)
            size += len(following.text)
        yield batch


def _write_manifest(
    folder: Path, settings: dict[str, Any], splits: dict[str, SplitRecord], counts: CountsRecord, end: tuple[str, int]
) -> None:
    vocab_size = vocabulary_size(load_tokenizer(folder / TOKENIZER))
    eos_token, eos_id = end
    manifest = Manifest(
        format=FORMAT,
        tokenizer=TokenizerRecord(TOKENIZER, file_sha256(folder / TOKENIZER), vocab_size, eos_id, eos_token),
        dtype=token_dtype(vocab_size),
        splits=splits,
        token_counts=counts,
        settings=settings,
        settings_sha256=settings_hash(settings),
    )
    write_manifest(folder, manifest)


def _bar(what: str, total: int) -> tqdm:
    """A bar over bytes of text; silent where the output is not a terminal."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
