"""The shards are ordinary webdataset shards: its own pipeline reads them, split over workers by any splitter."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pytest
import webdataset as wds

from mtp_dist.data.dataset import Dataset
from mtp_dist.data.reading import SampleReader


def plain(dataset: Dataset, split: str, rank: int, world: int) -> list[dict[str, Any]]:
    def splitter(urls: Iterable[Any]) -> Iterator[Any]:
        return islice(urls, rank, None, world)

    urls = [str(shard.path) for shard in dataset.split(split).shards]
    return list(wds.WebDataset(urls, shardshuffle=False, nodesplitter=splitter).decode())


@pytest.mark.parametrize("world", [1, 2])
def test_webdataset_reads_our_shards(dataset: Dataset, world: int) -> None:
    split = dataset.split("train")
    ours = {sample.key: sample.tokens for sample in SampleReader(split).read(0, split.documents)}
    theirs = [sample for rank in range(world) for sample in plain(dataset, "train", rank, world)]
    assert sorted(sample["__key__"] for sample in theirs) == sorted(ours)
    for sample in theirs:
        assert (sample["tokens.npy"] == ours[sample["__key__"]]).all()
        assert sample["tokens.npy"].dtype.name == dataset.manifest.dtype
        assert sample["json"]["name"].endswith(".txt")
