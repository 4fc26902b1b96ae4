"""One tiny dataset for every test that trains; and no process that outlives the module it ran for."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtp_dist.config.schema import ShardBuild
from mtp_dist.data.building import build
from tests.distributed.pool import end_pools

# Models here are tiny, and on a busy machine threads spend their time waiting for each other: one, here and in processes below.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 5 to 60 letters."""
    folder = tmp_path_factory.mktemp("text")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567"
    texts = ["".join(letters[(i * i + j * (1 + i % 7)) % 60] for j in range(5 + i * 13 % 56)) for i in range(240)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = ShardBuild(source="jsonl", input=[str(folder / "texts.jsonl")], out=str(folder / "dataset"), validation_share=0.1)
    config.tokenizer.kind = "bytes"
    build(config)
    return folder / "dataset"


@pytest.fixture(scope="module", autouse=True)
def pools() -> Iterator[None]:
    """Waiting ranks cost the tests after them time."""
    yield
    end_pools()
