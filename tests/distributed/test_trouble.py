"""Promise: what one rank finds out, all ranks act on: a reader's error or a damaged checkpoint neither hangs nor loses a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.tracking.jsonl import read_records
from tests.distributed.pool import run_jobs

LAYOUT = "pp2_zbv"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Callable[[str], tuple[list[Any], Path]]:
    """name -> (what each rank raised, run folder)."""
    folder = tmp_path_factory.mktemp("trouble")
    saving = {"checkpoint.every_steps": 2, "checkpoint.keep_last": 1}

    def job(name: str, run: str, steps: int, **more: Any) -> dict[str, Any]:
        places = {"data": str(tiny_dataset), "run_dir": str(folder / run)}
        arguments = {"layout": LAYOUT, **places, "steps": steps, "overrides": saving}
        return {"name": name, "task": "trouble", "arguments": arguments | more}

    newest = {"checkpoint": str(folder / "damaged" / "checkpoints" / "step_00000004")}
    saved = Path("checkpoints") / "step_00000002"
    jobs = [
        job("read", "read", 5, read_fails_at=4),
        job("first", "damaged", 4, overrides=saving | {"checkpoint.keep_last": 2}),
        {"name": "flip", "task": "damage", "arguments": newest},
        job("second", "damaged", 4),
        job("old", "later", 2),
        {"name": "format", "task": "write_later_format", "arguments": {"checkpoint": str(folder / "later" / saved)}},
        job("later", "later", 4),
        {"name": "folder", "task": "make_folder", "arguments": {"path": str(folder / "hollow" / saved)}},
        job("hollow", "hollow", 3),
    ]
    results = run_jobs(2, jobs, folder)
    return lambda name: (results[name], folder / {"first": "damaged", "second": "damaged"}.get(name, name))


def test_a_reader_that_fails_stops_all_ranks_after_a_save(runs: Any) -> None:
    raised, run = runs("read")
    assert raised == ["AgreedError: shard lost"] * 2
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [1, 2, 3]
    assert Checkpoint(run / "checkpoints" / "step_00000003").damages() == []


def test_a_damaged_checkpoint_is_set_aside_and_its_step_saved_again(runs: Any) -> None:
    raised, run = runs("second")
    assert raised == [None, None]
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert names == ["step_00000004", "step_00000004.damaged"], "keep_last=1 keeps the sound one"
    assert Checkpoint(run / "checkpoints" / "step_00000004").damages() == []
    assert Checkpoint(run / "checkpoints" / "step_00000004.damaged").damages() != []
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_checkpoint_of_a_later_format_is_left_alone(runs: Any) -> None:
    """An older version started by mistake must not rename what a newer one can read."""
    raised, run = runs("later")
    assert len(set(raised)) == 1
    assert "mtp_dist.checkpoint/9" in raised[0]
    assert "nothing was changed" in raised[0]
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == ["step_00000002"]
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [1, 2]


def test_a_folder_that_is_no_checkpoint_does_not_pass_for_one(runs: Any) -> None:
    raised, run = runs("hollow")
    assert raised == [None, None]
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert "step_00000002.damaged" in names
    assert Checkpoint(run / "checkpoints" / "step_00000003").damages() == []


def test_a_drifting_copy_of_the_embedding_is_noticed(tmp_path: Path) -> None:
    found = run_jobs(2, [{"name": "drift", "task": "drift", "arguments": {"layout": "pp2_1f1b"}}], tmp_path)["drift"]
    assert found == [[0.0, pytest.approx(0.25)]] * 2
