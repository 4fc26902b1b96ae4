"""From documents to rows: pure functions on arrays.

The documents of a stream are laid end to end. Row n covers positions n*S .. n*S + S + D: S inputs that are trained,
and 1 + D more tokens that only serve as targets (the next token, and what MTP depths look ahead). The next row starts S
positions later, so every position of the stream is an input exactly once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PADDING = -1  # document number of a position that is not data


class Sample(NamedTuple):
    """One document of the dataset: its key and its tokens, the end-of-document token last."""

    key: str
    tokens: np.ndarray


@dataclass(frozen=True)
class Row:
    """`tokens` int64 [length]; `documents` int32 [length], counted from 0 within the row; `samples`: key of each document."""

    tokens: np.ndarray
    documents: np.ndarray
    samples: list[str]


def row_length(sequence_length: int, ahead: int) -> int:
    """Tokens of a row: S + 1 + D. `ahead`: D, the farthest target behind the next token."""
    return sequence_length + 1 + ahead


def full_rows(tokens: int, sequence_length: int, ahead: int) -> int:
    """Rows that a stream of so many tokens fills completely."""
    return max(0, (tokens - 1 - ahead) // sequence_length)


def pack(samples: Sequence[Sample], offset: int, length: int) -> Row:
    """The row of `length` tokens that starts `offset` tokens into the first of `samples`.

    Raises ValueError where the offset lies outside the first sample or the samples are too short.
    """
    if not samples or not 0 <= offset < len(samples[0].tokens):
        raise ValueError(f"offset {offset} is outside the first document")
    tokens = np.empty(length, dtype=np.int64)
    documents = np.empty(length, dtype=np.int32)
    keys: list[str] = []
    filled = 0
    for sample in samples:
        if filled == length:
            break
        piece = sample.tokens[offset : offset + length - filled]
        tokens[filled : filled + len(piece)] = piece
        documents[filled : filled + len(piece)] = len(keys)
        filled += len(piece)
        keys.append(sample.key)
        offset = 0
    if filled < length:
        raise ValueError(f"{filled} tokens do not fill a row of {length}")
    return Row(tokens, documents, keys)
