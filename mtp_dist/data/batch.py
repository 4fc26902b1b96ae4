"""What the model is fed: rows of tokens, and which document each token belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mtp_dist.data.packing import PADDING, Row


@dataclass
class Batch:
    """Rows of S + 1 + D tokens.

    `tokens` int64 [rows, S+1+D]. `documents` int32 [rows, S+1+D]: number of the document within its row, counted from 0,
    -1 for padding. `samples`: for each row the keys of its documents.
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    samples: list[list[str]]

    def __len__(self) -> int:
        return len(self.tokens)


def collate(rows: Sequence[Row]) -> Batch:
    """Stack at least one row."""
    return Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        documents=torch.from_numpy(np.stack([row.documents for row in rows])),
        samples=[row.samples for row in rows],
    )


def pad(batch: Batch, rows: int, eos_id: int) -> Batch:
    """Add padding rows (documents -1, tokens `eos_id`) up to `rows` rows; ValueError where the batch has more."""
    missing = rows - len(batch)
    if missing < 0:
        raise ValueError(f"a batch of {len(batch)} rows does not fit in {rows}")
    shape = (missing, batch.tokens.shape[1])
    return Batch(
        tokens=torch.cat([batch.tokens, torch.full(shape, eos_id, dtype=torch.int64)]),
        documents=torch.cat([batch.documents, torch.full(shape, PADDING, dtype=torch.int32)]),
        samples=[*batch.samples, *([] for _ in range(missing))],
    )
