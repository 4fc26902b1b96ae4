"""Promise: a dataset says how often each token stands in its training text, also one that was built before it kept such a file;
and the most frequent tokens are those."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mtp_dist.data import token_counts
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.manifest import MANIFEST, MANIFEST_SUM, UNSUMMED
from mtp_dist.errors import UserError


def plainly(dataset: Dataset) -> list[int]:
    """Counted with nothing but tarfile and numpy."""
    found: Counter[int] = Counter()
    for shard in dataset.splits["train"].shards:
        with tarfile.open(shard.path) as tar:
            for member in tar:
                if member.name.endswith(".tokens.npy"):
                    found.update(np.load(io.BytesIO(tar.extractfile(member).read())).tolist())  # type: ignore[union-attr]
    return [found[token] for token in range(dataset.vocab_size)]


@pytest.fixture
def copied(dataset: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.path, tmp_path / "copy"))


def test_a_build_counts_its_training_tokens(dataset: Dataset) -> None:
    counts = token_counts.token_counts(dataset)
    assert (dataset.path / token_counts.FILE).is_file()
    assert counts.tolist() == plainly(dataset)
    assert counts.sum() == dataset.splits["train"].tokens
    assert counts[dataset.eos_id] == dataset.splits["train"].documents


def test_a_dataset_without_the_file_is_counted(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / manifest.pop("token_counts")["file"]).unlink()
    (copied / MANIFEST).write_text(json.dumps(manifest | {"format": UNSUMMED}))
    (copied / MANIFEST_SUM).unlink()
    monkeypatch.setattr(token_counts, "DOCUMENTS", 3)
    dataset = Dataset.open(copied)
    assert dataset.splits["train"].documents > 3
    assert token_counts.token_counts(dataset).tolist() == plainly(dataset)


def test_a_file_that_was_not_built_is_refused(copied: Path) -> None:
    np.save(copied / token_counts.FILE, np.arange(9))
    with pytest.raises(UserError, match="not the one that was built"):
        token_counts.token_counts(Dataset.open(copied))


def test_the_most_frequent_tokens() -> None:
    counts = np.array([5, 0, 7, 5, 9, 5, 0])
    assert [token_counts.most_frequent(counts, number) for number in (1, 2, 3, 4, 6, 7)] == [
        [4], [2, 4], [0, 2, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6],
    ]  # fmt: skip
