"""Promise: heads of a smaller draft vocabulary know the most frequent tokens of the text that they were first trained on; the
list is in every checkpoint, and no later start, of the run or of one that takes its heads over, makes another of them."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint.draft_tokens import DRAFT_TOKENS, choose, drafted
from mtp_dist.checkpoint.manifest import MANIFEST, MANIFEST_SUM, WITH_DRAFT_TOKENS, read_manifest
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import DecodeConfig, ShardBuild, TrainingRun
from mtp_dist.data.building import build
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.reading import SampleReader
from mtp_dist.decoding.engine import generate
from mtp_dist.errors import UserError
from tests.distributed.pool import run_jobs
from tests.distributed.tasks.runs import settings_of_run

LAYOUT = "tp2_odd_eagle_draft_vocabulary"
NUMBER = 30


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text in the same bytes."""
    folder = tmp_path_factory.mktemp("other")
    for number in range(30):
        (folder / f"{number}.txt").write_text("+-*/=<>" * (3 + number))
    config = ShardBuild(source="text", input=[str(folder)], out=str(folder / "dataset"), validation_share=0.2)
    config.tokenizer.kind = "bytes"
    return build(config)[0].path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """A run of three steps on two tensor ranks, stopped after the first; and, as a job, a start with another list."""
    folder = tmp_path_factory.mktemp("drafted")
    arguments: dict[str, Any] = {"layout": LAYOUT, "data": str(tiny_dataset), "run_dir": str(folder / "run"), "overrides": {}}
    jobs = [
        {"name": "train", "task": "train", "arguments": arguments | {"steps": 3, "stops": [1]}},
        {"name": "copy", "task": "copy", "arguments": {"run_dir": str(folder / "run")}},
        {"name": "change", "task": "relist", "arguments": {"run_dir": str(folder / "run")}},
        {"name": "changed", "task": "trouble", "arguments": arguments | {"steps": 4}},
    ]
    results = run_jobs(2, jobs, folder)
    (folder / "refused.json").write_text(json.dumps(results["changed"]))
    return folder / "run-look"


def settings(run_dir: Path, data: Path, **overrides: Any) -> TrainingRun:
    return settings_of_run(LAYOUT, str(data), str(run_dir), 3, {f"init.{key}": str(value) for key, value in overrides.items()})


def most_frequent(data: Path) -> list[int]:
    """Of the training split, ascending, counted plainly; of equal counts the lower token."""
    split = Dataset.open(data).split("train")
    counts = Counter(token for sample in SampleReader(split).read(0, split.documents) for token in sample.tokens.tolist())
    return sorted(sorted(range(257), key=lambda token: (-counts[token], token))[:NUMBER])


def test_the_list_is_in_every_checkpoint(run: Path, tiny_dataset: Path) -> None:
    """Whose format says so, for versions that would pass over it."""
    expected = most_frequent(tiny_dataset)
    assert expected != list(range(NUMBER))
    folders = sorted((run / "checkpoints").glob("step_*"))
    assert [folder.name for folder in folders] == ["step_00000001", "step_00000003"]
    for folder in folders:
        assert DRAFT_TOKENS in read_manifest(folder).files
        assert read_manifest(folder).format == WITH_DRAFT_TOKENS
        assert Checkpoint(folder).draft_tokens == expected


def test_a_decoder_needs_nothing_else(run: Path, tmp_path: Path, tiny_dataset: Path) -> None:
    """The checkpoint alone: every draft is one of the list."""
    alone = Checkpoint(Path(shutil.copytree(run / "checkpoints" / "step_00000003", tmp_path / "alone")))
    model = alone.load_model()
    assert model.drafted_tokens().tokens.tolist() == most_frequent(tiny_dataset)  # type: ignore[union-attr]
    text = generate(model, [97, 98], DecodeConfig(mode="speculative", max_new_tokens=12, stop_at_eos=False))
    plain = generate(model, [97, 98], DecodeConfig(mode="plain", max_new_tokens=12, stop_at_eos=False))
    assert text.tokens == plain.tokens
    assert sum(text.statistics.drafted) > 0


def test_a_run_keeps_its_list_on_other_data(run: Path, tmp_path: Path, tiny_dataset: Path, other_text: Path) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "run"))
    for lost in (False, True):
        if lost:
            (mine / DRAFT_TOKENS).unlink()
        choose(settings(mine, other_text))
        assert drafted(settings(mine, other_text)) == most_frequent(tiny_dataset)
    choose(settings(tmp_path / "fresh", other_text))
    assert drafted(settings(tmp_path / "fresh", other_text)) == most_frequent(other_text)
    assert most_frequent(other_text) != most_frequent(tiny_dataset)


def test_heads_that_are_taken_over_keep_theirs(run: Path, tmp_path: Path, tiny_dataset: Path, other_text: Path) -> None:
    start = run / "checkpoints" / "step_00000003"
    for heads, data in (("keep", tiny_dataset), ("fresh", other_text)):
        config = settings(tmp_path / heads, other_text, checkpoint=start, heads=heads)
        choose(config)
        assert drafted(config) == most_frequent(data)


def test_heads_of_the_first_versions_know_the_first_tokens(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run / "checkpoints" / "step_00000003", tmp_path / "old"))
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["files"][DRAFT_TOKENS]
    (old / MANIFEST).write_text(json.dumps(manifest | {"format": "mtp_dist.checkpoint/1"}))
    (old / MANIFEST_SUM).unlink()
    (old / DRAFT_TOKENS).unlink()
    assert Checkpoint(old).draft_tokens == list(range(NUMBER))


def test_another_list_is_refused(run: Path) -> None:
    """On every rank, before a step."""
    found = json.loads((run.parent / "refused.json").read_text())
    assert len(found) == 2
    for message in found:
        assert message.startswith("AgreedError: ")
        assert "draft_tokens.json holds other tokens than" in message


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": 1}', "[" + "1," * (NUMBER - 1) + "1]", str([*range(NUMBER - 1), 900])])
def test_a_damaged_list_is_refused(run: Path, tmp_path: Path, tiny_dataset: Path, content: str) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "run"))
    (mine / DRAFT_TOKENS).write_text(content)
    config = settings(mine, tiny_dataset)
    # Before a process starts, and in each of them.
    for asked in (choose, drafted):
        with pytest.raises(UserError, match="remove it and start the run without torchrun") as caught:
            asked(config)
        assert "\n" not in str(caught.value)
    (mine / DRAFT_TOKENS).unlink()
    choose(config)
    assert drafted(config) == most_frequent(tiny_dataset)
