"""The order of the data: L lanes, fixed for a run, whatever the number of processes.

1. The documents of a split, in stored order, are cut into blocks of `block_samples` consecutive ones.
2. Epoch e permutes the blocks by (seed, e); lane l reads every L-th of them, beginning with the l-th.
3. Inside a block the documents are permuted by (seed, e, block).

A lane that has read its blocks goes on with its blocks of the next epoch, without waiting for the others: within an epoch
every document belongs to exactly one lane. A place in a lane is four integers (`Position`), so a resume is a value.

Pure. Permutations are the ranks of raw Philox words, whose stream numpy keeps fixed (NEP 19 promises that for bit
generators, not for `Generator.permutation`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np

from mtp_dist.errors import UserError


@dataclass(frozen=True)
class Position:
    """A place in a lane: `token` of the `sample`-th document (shuffled) of the lane's `block`-th block of `epoch`."""

    epoch: int = 0
    block: int = 0
    sample: int = 0
    token: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> "Position":
        return cls(**value)


@lru_cache(maxsize=8)
def permutation(size: int, *seed: int | str) -> np.ndarray:
    """A permutation of range(size), int64, that depends on `seed` alone. Read-only."""
    key = int.from_bytes(sha256(repr(seed).encode()).digest()[:16], "little")
    order = np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Order:
    """Which documents each lane reads, and in which order."""

    documents: int
    lanes: int
    block_samples: int
    seed: int

    @classmethod
    def of(cls, documents: int, lanes: int, block_samples: int, seed: int) -> "Order":
        """The order of a split; blocks shrink where there would be fewer blocks than lanes.

        Raises UserError where there are fewer documents than lanes.
        """
        if lanes < 1 or block_samples < 1:
            raise UserError(f"data.lanes={lanes} and data.block_samples={block_samples} must be at least 1")
        if documents < lanes:
            raise UserError(
                f"data.lanes={lanes} needs at least as many documents, but the split has {documents}; "
                "choose fewer lanes or build a larger dataset"
            )
        return cls(documents, lanes, min(block_samples, documents // lanes), seed)

    @property
    def blocks(self) -> int:
        return -(-self.documents // self.block_samples)

    def lane_blocks(self, lane: int, epoch: int) -> np.ndarray:
        """Numbers of the blocks that `lane` reads in `epoch`, in reading order; never empty."""
        return permutation(self.blocks, "blocks", self.seed, epoch)[lane :: self.lanes]

    def block_range(self, block: int) -> tuple[int, int]:
        """First document of a block and the one behind its last, in stored order."""
        start = block * self.block_samples
        return start, min(start + self.block_samples, self.documents)

    def block_order(self, block: int, epoch: int) -> np.ndarray:
        """Places within the block in the order in which they are read in `epoch`."""
        start, stop = self.block_range(block)
        return permutation(stop - start, "samples", self.seed, epoch, block)


def lanes_of_replica(lanes: int, replica: int, replicas: int) -> range:
    """The lanes that one replica reads: a contiguous share."""
    share = lanes // replicas
    return range(replica * share, (replica + 1) * share)


def check_layout(rows: int, lanes: int, replicas: int) -> None:
    """Raises UserError unless every replica gets whole lanes and every lane the same number of rows of a global batch."""
    if rows < 1 or rows % lanes:
        raise UserError(f"train.global_batch={rows} is not a multiple of data.lanes={lanes}; choose a multiple, or fewer lanes")
    if lanes % replicas:
        raise UserError(f"data.lanes={lanes} is not a multiple of parallel.data={replicas}; choose a multiple")
