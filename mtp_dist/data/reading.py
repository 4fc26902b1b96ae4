"""Samples by their number, through webdataset, with proof that nothing was lost.

A run of samples is one byte range of a shard. Its checksums are compared with the index before webdataset parses it
(`tar_file_expander`, `group_by_keys`, `decode`), and the keys and lengths that come out are compared after. A tar
without its damaged part would pass for a shorter one; here every difference is a `ShardError` naming shard and sample.
"""

import hashlib
import io
from itertools import accumulate
from zlib import crc32

import numpy as np
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from mtp_dist.data.dataset import Shard, Split
from mtp_dist.data.index import TOKENS, ShardIndex
from mtp_dist.data.packing import Sample
from mtp_dist.errors import UserError
from mtp_dist.member_file import open_member

INDEX_BYTES, INDEX_BYTES_PER_DOCUMENT = 1 << 16, 256
"""Of an index, at most: about 50 a document are needed."""


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
    name = shard.index_path.name
    try:
        with open_member(shard.folder, shard.record.index) as file:
            data = file.read(INDEX_BYTES + INDEX_BYTES_PER_DOCUMENT * shard.documents)
    except OSError as error:
        raise ShardError(shard, f"its index {name} cannot be read ({error})") from error
    if hashlib.sha256(data).hexdigest() != shard.record.index_sha256:
        raise ShardError(shard, f"its index {name} is not the one that was built (SHA-256 differs)")
    try:
        index = ShardIndex.load(data)
    except Exception as error:  # a file that was made to mislead raises whatever numpy comes to
        raise ShardError(shard, f"its index {name} cannot be read ({str(error)[:100]})") from error
    if len(index) != shard.documents or int(index.tokens.sum()) != shard.tokens:
        raise ShardError(shard, f"its index {name} counts other documents or tokens than dataset.json")
    if int(index.offsets[-1] + index.sizes[-1]) > shard.bytes:
        raise ShardError(shard, f"its index {name} reaches beyond its {shard.bytes} bytes")
    # Documents are numbered over all shards of a split: one that was exchanged for another, or is there twice, shows.
    for number in (0, len(index) - 1):
        if index.keys[number] != shard.key(number).encode():
            raise ShardError(shard, f"its index {name} has {index.keys[number]!r} for sample {shard.key(number)}")
    return index


def read_range(shard: Shard, index: ShardIndex, first: int, last: int) -> list[Sample]:
    """Samples first .. last - 1 of one shard, verified. Raises ShardError."""
    begin = int(index.offsets[first])
    end = int(index.offsets[last - 1] + index.sizes[last - 1])
    try:
        with open_member(shard.folder, shard.record.file) as file:
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
    except Exception as error:  # tarfile and numpy raise whatever they come to
        raise ShardError(shard, f"it does not parse ({type(error).__name__})") from error


def _check_samples(shard: Shard, index: ShardIndex, first: int, last: int, samples: list[Sample]) -> None:
    if len(samples) != last - first:
        raise ShardError(shard, f"decoded {len(samples)} samples; its index lists {last - first}")
    for number, sample in zip(range(first, last), samples, strict=True):
        key = index.keys[number].decode()
        if sample.key != key:
            raise ShardError(shard, f"sample {sample.key} stands where its index has {key}")
        if sample.tokens.ndim != 1 or len(sample.tokens) != index.tokens[number]:
            raise ShardError(shard, f"sample {key} has {sample.tokens.size} tokens; its index says {index.tokens[number]}")
        _check_tokens(shard, key, sample.tokens)


def _check_tokens(shard: Shard, key: str, tokens: np.ndarray) -> None:
    """One pass over numbers that are in the processor's cache: about 2% of the time of reading them."""
    encoding = shard.encoding
    if tokens.dtype != encoding.dtype:
        raise ShardError(shard, f"sample {key} is stored as {tokens.dtype}; dataset.json says {encoding.dtype}")
    if (largest := int(tokens.max())) >= encoding.vocab_size:
        raise ShardError(shard, f"sample {key} has token {largest}, outside the vocabulary of {encoding.vocab_size}")
    if (last := int(tokens[-1])) != encoding.eos_id:
        raise ShardError(shard, f"sample {key} ends with token {last}, not with the end-of-document token {encoding.eos_id}")
