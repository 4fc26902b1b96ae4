"""The order of the data: L lanes, fixed for a run, whatever the number of processes.

1. The documents of a split, in stored order, are cut into blocks of `block_samples` consecutive ones.
2. Epoch e permutes the blocks by (seed, e); lane l reads every L-th of them, beginning with the l-th.
3. Inside a block the documents are permuted by (seed, e, block).
4. A lane's blocks are grouped into windows, as equal as possible, of about `data.mix_tokens` / L tokens. The documents of a
   window, laid end to end, are cut into rows, and the rows are permuted by (seed, e, lane, window): a step holds rows of many
   documents. With `data.mix_tokens=0` there are no windows, and rows follow the documents; earlier versions knew only that.

A lane that has read its blocks goes on with its blocks of the next epoch, without waiting for the others: within an epoch
every document belongs to exactly one lane. A place in a lane is four integers (`Position`, `MixedPosition`), so a resume is a
value.

Pure. Permutations are the ranks of raw Philox words, whose stream numpy keeps fixed (NEP 19 promises that for bit
generators, not for `Generator.permutation`).
"""

from dataclasses import asdict, dataclass, replace
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


@dataclass(frozen=True)
class MixedPosition:
    """A place in a lane of mixed rows: `row` rows of `window` of `epoch` were handed out. `offset`: the token of the window at
    which its first row starts."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    offset: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def _random_words(size: int, seed: tuple[int | str, ...]) -> np.ndarray:
    """uint64 [size], a function of `seed` alone."""
    key = int.from_bytes(sha256(repr(seed).encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(size)


@lru_cache(maxsize=8)
def permutation(size: int, *seed: int | str) -> np.ndarray:
    """A permutation of range(size), int64, that depends on `seed` alone. Read-only."""
    order = np.argsort(_random_words(size, seed), kind="stable")
    order.flags.writeable = False
    return order


# When each residue of a row number modulo 8 has its turn. Residues that differ by one are at least three turns apart.
_TURNS = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def row_permutation(size: int, *seed: int | str) -> np.ndarray:
    """A permutation of range(size), int64, that depends on `seed` alone and keeps neighbours apart.

    Every eighth row is handed out in random order, then another residue modulo 8, and so on: no quarter of the permutation holds
    two neighbouring rows (often of one document), and each eighth of it holds an eighth of every long document.
    """
    return np.lexsort((_random_words(size, seed), _TURNS[np.arange(size) % len(_TURNS)]))


@dataclass(frozen=True)
class Order:
    """Which documents each lane reads, and in which order.

    `window_blocks`: a lane mixes the rows of at most so many blocks; 0: rows are not mixed.
    """

    documents: int
    lanes: int
    block_samples: int
    seed: int
    window_blocks: int = 0

    @classmethod
    def of(cls, documents: int, tokens: int, *, lanes: int, block_samples: int, mix_tokens: int, seed: int) -> "Order":
        """The order of a split of so many documents and tokens; blocks shrink where there would be fewer blocks than lanes.

        `mix_tokens`: tokens that all lanes together keep open for mixing, rounded to whole blocks a lane; 0: rows are not mixed.

        Raises UserError where there are fewer documents than lanes.
        """
        if lanes < 1 or block_samples < 1:
            raise UserError(f"data.lanes={lanes} and data.block_samples={block_samples} must be at least 1")
        if documents < lanes:
            raise UserError(
                f"data.lanes={lanes} needs at least as many documents, but the split has {documents}; "
                "choose fewer lanes or build a larger dataset"
            )
        order = cls(documents, lanes, min(block_samples, documents // lanes), seed)
        if not mix_tokens:
            return order
        # Integers only: the result is the same on every machine.
        per_lane, per_block = mix_tokens * order.blocks, tokens * lanes
        return replace(order, window_blocks=max(1, (2 * per_lane + per_block) // (2 * per_block)))

    @property
    def blocks(self) -> int:
        return -(-self.documents // self.block_samples)

    def lane_blocks(self, lane: int, epoch: int) -> np.ndarray:
        """Numbers of the blocks that `lane` reads in `epoch`, in reading order; never empty."""
        return permutation(self.blocks, "blocks", self.seed, epoch)[lane :: self.lanes]

    def windows(self, lane: int, epoch: int) -> list[range]:
        """The windows of `lane` in `epoch`: places in its `lane_blocks`, in reading order; sizes differ by at most one."""
        blocks = len(self.lane_blocks(lane, epoch))
        count = -(-blocks // self.window_blocks)
        return [range(number * blocks // count, (number + 1) * blocks // count) for number in range(count)]

    def row_order(self, lane: int, epoch: int, window: int, rows: int) -> np.ndarray:
        """Numbers of a window's rows in the order in which they are handed out, int64 [rows]."""
        return row_permutation(rows, "rows", self.seed, epoch, lane, window)

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
