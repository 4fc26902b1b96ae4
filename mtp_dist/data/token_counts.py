"""How often each token stands in the training split: written when shards are built, read when a run chooses the tokens among
which its heads draft (`mtp.draft_vocabulary`). No torch where the file is there."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtp_dist.data.dataset import Dataset, file_sha256
from mtp_dist.data.manifest import CountsRecord
from mtp_dist.errors import UserError
from mtp_dist.member_file import open_member

FILE = "token_counts.npy"
HEADER = 4096
"""Bytes, at most, of a .npy file before its values."""
DOCUMENTS = 4096
"""Read together where counts are made from shards."""


def save(folder: Path, counts: np.ndarray) -> CountsRecord:
    """Write counts int64 [V] into a dataset's folder; their entry of dataset.json."""
    np.save(folder / FILE, counts)
    return CountsRecord(FILE, file_sha256(folder / FILE))


def token_counts(dataset: Dataset) -> np.ndarray:
    """int64 [V], the dataset's own file, or counted now, for one built before there was such a file (a pass over its shards).

    Raises UserError where the file is not the one that was built, or a shard is damaged.
    """
    entry = dataset.manifest.token_counts
    if entry is None:
        return _counted(dataset)
    path = dataset.path / entry.file
    try:
        with open_member(dataset.path, entry.file) as file:
            content = file.read(HEADER + 8 * dataset.vocab_size)
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise UserError(
            f"{path} is missing, or not the one that was built (SHA-256 differs); restore it or build the dataset again"
        )
    try:
        counts: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
        good = counts.dtype == np.int64 and counts.shape == (dataset.vocab_size,) and counts.min() >= 0
        if not good or counts.sum() != dataset.splits["train"].tokens:
            raise ValueError("it does not count the tokens of the training split")
    except Exception as error:  # a file that was made to mislead raises whatever numpy comes to
        raise UserError(f"{path} cannot be used ({str(error)[:100]}); build the dataset again") from None
    return counts


def counted(documents: Sequence[np.ndarray], vocabulary: int) -> np.ndarray:
    """int64 [V]: how often each token stands in these documents."""
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int64)
    return np.bincount(tokens, minlength=vocabulary)


def most_frequent(counts: np.ndarray, number: int) -> list[int]:
    """The tokens with the largest counts, ascending; of equal counts the lower token goes first."""
    order = np.argsort(-counts, kind="stable")[:number]
    return sorted(int(token) for token in order)


def _counted(dataset: Dataset) -> np.ndarray:
    from mtp_dist.data.reading import SampleReader

    split = dataset.split("train")
    reader, counts = SampleReader(split), np.zeros(dataset.vocab_size, dtype=np.int64)
    for start in range(0, split.documents, DOCUMENTS):
        samples = reader.read(start, min(start + DOCUMENTS, split.documents))
        counts += counted([sample.tokens for sample in samples], dataset.vocab_size)
    return counts
