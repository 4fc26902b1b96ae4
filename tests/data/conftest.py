"""Small datasets built from generated text by the real builder."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_dist.config.schema import ShardBuild, TokenizerConfig
from mtp_dist.data.building import build
from mtp_dist.data.dataset import Dataset

DOCUMENTS = 230


def write_texts(folder: Path, documents: int = DOCUMENTS, seed: int = 0) -> dict[str, str]:
    """Text files of 1 to 400 characters, some of them not ASCII; name -> text."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    texts = {}
    for number in range(documents):
        words = draw.choices(["tar", "lane ", "λ", "\r\n", "épo", "que ", "<|endoftext|>", "\t", "🙂"], k=draw.randint(1, 100))
        name = f"{draw.choice('abc')}/{number:04d}.txt"
        texts[name] = "".join(words)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(texts[name].encode())
    return texts


def build_config(out: Path, **settings: object) -> ShardBuild:
    """A build with the byte tokenizer and shards so small that a split has several."""
    defaults: dict[str, object] = {"tokenizer": TokenizerConfig(kind="bytes"), "shard_mb": 0.05, "validation_share": 0.2}
    return ShardBuild(out=str(out), **{**defaults, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "texts"
    write_texts(folder)
    return folder


@pytest.fixture(scope="session")
def texts(texts_folder: Path) -> dict[str, str]:
    return {path.relative_to(texts_folder).as_posix(): path.read_bytes().decode() for path in texts_folder.rglob("*.txt")}


@pytest.fixture(scope="session")
def dataset(texts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Read-only: 230 documents in several shards of two splits."""
    out = tmp_path_factory.mktemp("dataset") / "texts"
    return build(build_config(out, source="text", input=[str(texts_folder)]))[0]


@pytest.fixture
def own_dataset(texts_folder: Path, tmp_path: Path) -> Callable[[], Dataset]:
    """A dataset that a test may damage."""

    def make() -> Dataset:
        return build(build_config(tmp_path / "own", source="text", input=[str(texts_folder)]))[0]

    return make
