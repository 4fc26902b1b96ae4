"""Build a dataset: documents of a source, tokenised, in shards.

1. Documents are read in the source's order and split by a hash of their names.
2. The tokenizer is made (a BPE learns from the training split only) and written first.
3. Each document becomes its tokens and the end-of-document token, appended to its split's shards.
4. dataset.json is written last, then the folder gets its name. The same settings and input give the same bytes.

Built into <out>.building: an interrupted build leaves nothing that looks complete, and the next one starts afresh.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from mtp_dist.config.schema import ShardBuild
from mtp_dist.data import token_counts
from mtp_dist.data.dataset import Dataset, file_sha256
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
from mtp_dist.data.sources.source import Document, Source, open_source
from mtp_dist.data.tokenizer import byte_tokenizer, end_of_document, load_tokenizer, text_tokenizer, train_bpe, vocabulary_size
from mtp_dist.data.workspace import building_folder, check_free
from mtp_dist.errors import UserError

TOKENIZER = "tokenizer.json"
MIB = 2**20
BATCH_BYTES = 4 * MIB  # text tokenised at a time
BATCH_DOCUMENTS = 1024
RESERVE = 64 * MIB  # disk that is left alone


def build(config: ShardBuild) -> tuple[Dataset, bool]:
    """The dataset at `config.out`, and whether it was built now (False: it was complete already).

    Raises UserError where a setting, the input, the disk or what lies at `out` does not allow it.
    """
    _check(config)
    out = Path(config.out).expanduser()
    settings = build_settings(config)
    if _complete(out, settings):
        return Dataset.open(out), False
    if config.workers:
        # Read by the tokenizers library when it starts its threads.
        os.environ["RAYON_NUM_THREADS"] = str(config.workers)
    source = open_source(config)
    check_free(out, _estimate(source, config) + RESERVE)
    with building_folder(out) as folder:
        _make_tokenizer(source, config).save(str(folder / TOKENIZER))
        splits, counts = _write_shards(source, config, folder)
        _write_manifest(folder, settings, splits, token_counts.save(folder, counts))
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
        load_tokenizer(config.tokenizer.path)
        tokenizer["sha256"] = file_sha256(Path(config.tokenizer.path))
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


def _check(config: ShardBuild) -> None:
    if not config.out:
        raise UserError("out is empty; name the dataset folder to make")
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


def _limited(source: Source, limit_mb: float) -> Iterator[Document]:
    """The documents that are used: none empty, no more once `limit_mb` MiB of text (0: any) are out."""
    left = limit_mb * MIB
    for document in source:
        if document.text:
            yield document
            left -= len(document.text.encode())
            if limit_mb and left <= 0:
                return


def _make_tokenizer(source: Source, config: ShardBuild) -> Tokenizer:
    if config.tokenizer.kind == "bytes":
        return byte_tokenizer()
    if config.tokenizer.kind == "file":
        return load_tokenizer(config.tokenizer.path)
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


def _write_shards(source: Source, config: ShardBuild, folder: Path) -> tuple[dict[str, SplitRecord], np.ndarray]:
    """Tokenise and write all documents; the `splits` entry of dataset.json, and how often each token stands in those of the
    training split, int64 [V]."""
    tokenizer = text_tokenizer(folder / TOKENIZER)
    eos_id = end_of_document(tokenizer)[1]
    vocabulary = vocabulary_size(tokenizer)
    dtype, counts = token_dtype(vocabulary), np.zeros(vocabulary, dtype=np.int64)
    shard_bytes = int(config.shard_mb * MIB)
    writers = {split: SplitWriter(folder, split, shard_bytes, dtype) for split in SPLITS}
    written = 0
    with _bar("shards", source.size()) as bar:
        for batch in _batches(_limited(source, config.limit_mb)):
            encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
            learned: list[np.ndarray] = []
            for document, encoding in zip(batch, encodings, strict=True):
                tokens = np.array([*encoding.ids, eos_id], dtype=dtype)
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


def _write_manifest(folder: Path, settings: dict[str, Any], splits: dict[str, SplitRecord], counts: CountsRecord) -> None:
    tokenizer = load_tokenizer(folder / TOKENIZER)
    eos_token, eos_id = end_of_document(tokenizer)
    vocab_size = vocabulary_size(tokenizer)
    manifest = Manifest(
        format=FORMAT,
        tokenizer=TokenizerRecord(TOKENIZER, file_sha256(folder / TOKENIZER), vocab_size, eos_id, eos_token),
        dtype=token_dtype(vocab_size).name,
        splits=splits,
        token_counts=counts,
        settings=settings,
        settings_sha256=settings_hash(settings),
    )
    write_manifest(folder, manifest)


def _bar(what: str, total: int) -> tqdm:
    """A bar over bytes of text; silent where the output is not a terminal."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
