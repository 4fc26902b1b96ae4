"""Whatever is wrong with a dataset's files is an error that names the shard; nothing is lost silently."""

import collections
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtp_dist.data.dataset import Dataset, Shard
from mtp_dist.data.prefetch import Prefetch
from mtp_dist.data.reading import SampleReader, ShardError, load_index, read_range
from mtp_dist.data.stream import Stream
from mtp_dist.errors import UserError

Make = Callable[[], Dataset]


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def read_all(dataset: Dataset) -> list:
    split = dataset.split("train")
    return SampleReader(split).read(0, split.documents)


@pytest.mark.parametrize("where", ["first header", "last header", "payload", "padding"])
def test_a_flipped_bit_names_shard_and_sample(own_dataset: Make, where: str) -> None:
    dataset = own_dataset()
    shard = dataset.split("train").shards[1]
    index = load_index(shard)
    start, size = int(index.offsets[3]), int(index.sizes[3])
    # A sample is two members: json (header, one record) and the tokens (header, records).
    place = {"first header": 20, "last header": 1024 + 148, "payload": 1536 + 130, "padding": size - 1}
    flip(shard.path, start + place[where])
    with pytest.raises(ShardError, match=f"{shard.path.name}.*sample {index.keys[3].decode()} fails its checksum"):
        read_all(dataset)


def test_no_flipped_bit_passes(own_dataset: Make) -> None:
    dataset = own_dataset()
    shard = dataset.split("train").shards[0]
    index = load_index(shard)
    draw = random.Random(1)
    for _ in range(100):
        position = draw.randrange(int(index.offsets[-1] + index.sizes[-1]))
        flip(shard.path, position)
        with pytest.raises(ShardError, match=shard.path.name):
            read_range(shard, index, 0, len(index))
        flip(shard.path, position)
    assert len(read_range(shard, index, 0, len(index))) == shard.documents


def cut(shard: Shard, sample: int) -> None:
    """Cut a tar right before a header: what is left is a valid, shorter tar."""
    with shard.path.open("r+b") as file:
        file.truncate(int(load_index(shard).offsets[sample]))


def test_a_cut_shard_is_noticed_at_once(own_dataset: Make) -> None:
    dataset = own_dataset()
    shard = dataset.split("train").shards[0]
    cut(shard, 5)
    with pytest.raises(UserError, match=rf"{shard.path.name} is \d+ bytes; expected {shard.bytes}"):
        Dataset.open(dataset.path)


def test_a_shard_cut_while_in_use_is_noticed(own_dataset: Make) -> None:
    dataset = own_dataset()
    shard = dataset.split("train").shards[0]
    key = load_index(shard).keys[5].decode()
    cut(shard, 5)
    with pytest.raises(ShardError, match=f"{shard.path.name}.*ends within sample {key}"):
        read_all(dataset)


def test_a_missing_shard_is_named(own_dataset: Make) -> None:
    dataset = own_dataset()
    shard = dataset.split("train").shards[1]
    shard.path.unlink()
    with pytest.raises(UserError, match=f"{shard.path.name} is missing"):
        Dataset.open(dataset.path)
    with pytest.raises(ShardError, match=f"{shard.path.name}.*cannot be read"):
        read_all(dataset)


def test_the_index_of_another_shard_is_named(own_dataset: Make) -> None:
    dataset = own_dataset()
    first, second = dataset.split("train").shards[:2]
    first.index_path.write_bytes(second.index_path.read_bytes())
    with pytest.raises(ShardError, match=f"{first.path.name}.*{first.index_path.name} is not the one"):
        read_all(dataset)


def test_a_missing_index_is_named(own_dataset: Make) -> None:
    dataset = own_dataset()
    shard = dataset.split("train").shards[0]
    shard.index_path.unlink()
    with pytest.raises(UserError, match=f"{shard.index_path.name}.*missing"):
        Dataset.open(dataset.path)
    with pytest.raises(ShardError, match=f"{shard.path.name}.*cannot be read"):
        read_all(dataset)


def test_an_index_that_contradicts_the_tar_is_an_error(dataset: Dataset) -> None:
    """Even where every checksum is right: keys and lengths that come out of webdataset are compared too."""
    shard = dataset.split("train").shards[0]
    index = load_index(shard)
    keys = index.keys.copy()
    keys[[2, 3]] = keys[[3, 2]]
    with pytest.raises(ShardError, match=f"{shard.path.name}.*where its index has {keys[2].decode()}"):
        read_range(shard, replace(index, keys=keys), 0, 8)
    tokens = index.tokens + (np.arange(len(index)) == 4)
    with pytest.raises(ShardError, match=f"{shard.path.name}.*sample {index.keys[4].decode()} has"):
        read_range(shard, replace(index, tokens=tokens), 0, 8)


def test_damage_surfaces_through_stream_and_prefetch(own_dataset: Make) -> None:
    dataset = own_dataset()
    shard = dataset.split("train").shards[0]
    flip(shard.path, int(load_index(shard).offsets[0]) + 1536 + 129)
    settings = {"rows": 4, "sequence_length": 32, "ahead": 1, "lanes": 4, "block_samples": 8, "mix_tokens": 4000, "seed": 1}
    ahead = Prefetch(Stream(dataset, "train", replica=0, replicas=1, **settings), 2)  # type: ignore[arg-type]
    with pytest.raises(ShardError, match=shard.path.name):
        collections.deque((ahead.next() for _ in range(10_000)), maxlen=0)
    ahead.close()


def test_a_folder_without_dataset_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a dataset.*build_shards\.py"):
        Dataset.open(tmp_path / "nowhere")


@pytest.mark.parametrize(("content", "named"), [("{", "damaged"), ("[]", "damaged"), ('{"format": "other/7"}', "other/7")])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=named):
        Dataset.open(tmp_path)


def test_a_manifest_with_a_missing_entry_is_named(own_dataset: Make) -> None:
    dataset = own_dataset()
    manifest = json.loads((dataset.path / "dataset.json").read_text())
    del manifest["splits"]["train"]["shards"][0]["sha256"]
    (dataset.path / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"dataset\.json is damaged.*sha256"):
        Dataset.open(dataset.path)


def test_another_tokenizer_in_the_folder_is_noticed(own_dataset: Make) -> None:
    dataset = own_dataset()
    dataset.tokenizer_path.write_text(dataset.tokenizer_path.read_text() + " ")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that made these shards"):
        Dataset.open(dataset.path)
