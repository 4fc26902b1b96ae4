"""One pool a world size for the whole session, made when the first test asks for it; one tiny dataset for all runs."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config.schema import ShardBuild
from mtp_dist.data.building import build
from tests.distributed.layouts import LAYOUTS, world
from tests.distributed.pool import run_jobs


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """layout -> results of ``tasks.parity`` on each rank."""

    @cache
    def of_world(size: int) -> dict[str, list[Any]]:
        jobs = [{"name": name, "task": "parity", "arguments": {"layout": name}} for name in LAYOUTS if world(name) == size]
        return run_jobs(size, jobs, tmp_path_factory.mktemp(f"world{size}"))

    return lambda layout: of_world(world(layout))[layout]


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
