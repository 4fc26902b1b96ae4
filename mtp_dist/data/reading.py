"""Samples by their number, through webdataset, with proof that nothing was lost.

A run of samples is one byte range of a shard. Its checksums are compared with the index before webdataset parses it
(`tar_file_expander`, `group_by_keys`, `decode`), and the keys and lengths that come out are compared after. A tar
without its damaged part would pass for a shorter one; here every difference is a `ShardError` naming shard and sample.
"""

import hashlib
import io
import tarfile
import zipfile
from itertools import accumulate
from zlib import crc32

import numpy as np
import webdataset as wds
from webdataset.autodecode import DecodingError
from webdataset.tariterators import group_by_keys, tar_file_expander

from mtp_dist.data.dataset import Shard, Split
from mtp_dist.data.index import TOKENS, ShardIndex
from mtp_dist.data.packing import Sample
from mtp_dist.errors import UserError


class ShardError(UserError):
    """A shard or its index is not what was built."""

    def __init__(self, shard: Shard, what: str) -> None:
        super().__init__(f"shard {shard.path} is damaged: {what}; restore it or build the dataset again")


class SampleReader:
    """Random access to the samples of a split by their number in stored order. Indexes are read when first needed."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._bounds = [0, *accumulate(shard.documents for shard in split.shards)]
        self._indexes: dict[int, ShardIndex] = {}

    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64 [documents]."""
        return np.concatenate([self._index(number).tokens for number in range(len(self.split.shards))])

    def read(self, start: int, stop: int) -> list[Sample]:
        """Samples start .. stop - 1. Raises ShardError."""
        samples: list[Sample] = []
        for number, shard in enumerate(self.split.shards):
            first, last = (min(max(edge - self._bounds[number], 0), shard.documents) for edge in (start, stop))
            if first < last:
                samples += read_range(shard, self._index(number), first, last)
        if len(samples) != stop - start:
            raise IndexError(f"samples {start} .. {stop - 1} of {self.split.documents}")
        return samples

    def _index(self, number: int) -> ShardIndex:
        if number not in self._indexes:
            self._indexes[number] = load_index(self.split.shards[number])
        return self._indexes[number]


def load_index(shard: Shard) -> ShardIndex:
    """The index of a shard; raises ShardError where it is not the one that was built."""
    try:
        data = shard.index_path.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise ShardError(shard, f"its index {shard.index_path.name} is not the one that was built (SHA-256 differs)")
        index = ShardIndex.load(data)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ShardError(shard, f"its index {shard.index_path.name} cannot be read ({error})") from error
    if len(index) != shard.documents or int(index.tokens.sum()) != shard.tokens:
        raise ShardError(shard, f"its index {shard.index_path.name} counts other documents or tokens than dataset.json")
    return index


def read_range(shard: Shard, index: ShardIndex, first: int, last: int) -> list[Sample]:
    """Samples first .. last - 1 of one shard, verified. Raises ShardError."""
    begin = int(index.offsets[first])
    end = int(index.offsets[last - 1] + index.sizes[last - 1])
    try:
        with shard.path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
    except OSError as error:
        raise ShardError(shard, f"it cannot be read ({error})") from error
    _check_bytes(shard, index, first, last, data)
    samples = _parse(shard, data)
    _check_samples(shard, index, first, last, samples)
    return samples


def _check_bytes(shard: Shard, index: ShardIndex, first: int, last: int, data: bytes) -> None:
    view = memoryview(data)
    begin = int(index.offsets[first])
    for number in range(first, last):
        start = int(index.offsets[number]) - begin
        piece = view[start : start + int(index.sizes[number])]
        key = index.keys[number].decode()
        if len(piece) < index.sizes[number]:
            raise ShardError(shard, f"it ends within sample {key}")
        if crc32(piece) != index.checksums[number]:
            raise ShardError(shard, f"sample {key} fails its checksum")


def _parse(shard: Shard, data: bytes) -> list[Sample]:
    source = [{"url": str(shard.path), "stream": io.BytesIO(data)}]
    members = tar_file_expander(source, select_files=lambda name: name.endswith(f".{TOKENS}"))
    try:
        return [Sample(sample["__key__"], sample[TOKENS]) for sample in wds.decode()(group_by_keys(members))]
    except (tarfile.TarError, DecodingError, ValueError, KeyError) as error:
        raise ShardError(shard, f"it does not parse ({type(error).__name__})") from error


def _check_samples(shard: Shard, index: ShardIndex, first: int, last: int, samples: list[Sample]) -> None:
    if len(samples) != last - first:
        raise ShardError(shard, f"{len(samples)} samples came out for the {last - first} of its index")
    for number, sample in zip(range(first, last), samples, strict=True):
        key = index.keys[number].decode()
        if sample.key != key:
            raise ShardError(shard, f"sample {sample.key} stands where its index has {key}")
        if sample.tokens.ndim != 1 or len(sample.tokens) != index.tokens[number]:
            raise ShardError(shard, f"sample {key} has {sample.tokens.size} tokens for the {index.tokens[number]} of its index")
