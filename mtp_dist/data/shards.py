"""Write the documents of a split as shards: webdataset tars with their indexes.

The same documents give the same bytes: times, owners and modes in the tar headers are constants.
"""

from pathlib import Path

import numpy as np
import webdataset as wds

from mtp_dist.data.dataset import file_sha256
from mtp_dist.data.index import TOKENS, ShardIndex
from mtp_dist.data.manifest import ShardRecord, SplitRecord, sample_key, shard_names


class SplitWriter:
    """Documents in, shards of about `shard_bytes` out, at `folder`/<split>/<split>-000000.tar and so on."""

    def __init__(self, folder: Path, split: str, shard_bytes: int, dtype: np.dtype) -> None:
        self._folder, self._split, self._shard_bytes, self._dtype = folder, split, shard_bytes, dtype
        self._writer: wds.TarWriter | None = None
        self._path = folder
        self._written = 0  # documents in the open shard
        self._documents = 0
        self._shards: list[ShardRecord] = []

    def add(self, name: str, tokens: np.ndarray) -> bool:
        """Append one document, `tokens` with its end-of-document token; True where that began a new shard."""
        fresh = self._writer is None
        writer = self._writer or self._open()
        key = sample_key(self._split, self._documents)
        writer.write({"__key__": key, "json": {"name": name}, TOKENS: tokens.astype(self._dtype)})
        self._documents += 1
        self._written += 1
        if writer.tarstream.offset >= self._shard_bytes:
            self._finish()
        return fresh

    def close(self) -> SplitRecord:
        """Finish the last shard; the split's entry of dataset.json."""
        self._finish()
        return SplitRecord(self._documents, sum(shard.tokens for shard in self._shards), self._shards)

    def _open(self) -> wds.TarWriter:
        self._path = self._folder / shard_names(self._split, len(self._shards))[0]
        self._path.parent.mkdir(exist_ok=True)
        self._file = self._path.open("wb")
        self._writer = wds.TarWriter(self._file, user="", group="", mode=0o644, mtime=0)
        return self._writer

    def _finish(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._file.close()
        index = ShardIndex.scan(self._path)
        if len(index) != self._written:
            raise OSError(f"{self._path}: {len(index)} documents read back for {self._written} written")
        names = shard_names(self._split, len(self._shards))
        index_path = self._folder / names[1]
        index.save(index_path)
        self._shards.append(
            ShardRecord(
                file=names[0],
                bytes=self._path.stat().st_size,
                sha256=file_sha256(self._path),
                documents=len(index),
                tokens=int(index.tokens.sum()),
                index=names[1],
                index_sha256=file_sha256(index_path),
            )
        )
        self._writer, self._written = None, 0
