"""Promise: a checkpoint's held-out numbers do not depend on the layout that evaluates it, nor on the one that trained it.

Tolerance, float32: layouts differ by the order of sums only; see tests/distributed/comparison.py.
"""

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mtp_dist import evaluate
from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.config.schema import Evaluation, ParallelConfig, ShardBuild, TrainingRun
from mtp_dist.data.building import build
from mtp_dist.errors import UserError
from mtp_dist.evaluate import equal_rounds, prepare
from tests.distributed.pool import ROOT, run_jobs

TOLERANCE = 1e-5
STEPS = 2
ROWS = (1, 5, 7)  # none fills a pass of 2 replicas x 2 rows
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "pp2_zbv": {"pipeline": 2, "schedule": "zbv"},
    "pp2_dualpipev": {"pipeline": 2, "schedule": "dualpipev"},
    "pp2_1f1b": {"pipeline": 2, "schedule": "1f1b"},
    # 5 rows are 3 micro-batches, which do not make equal rounds of 2 ranks.
    "pp2_interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "pp2_uneven": {"pipeline": 2, "schedule": "zbv", "placement": "[2,1,1,0]"},
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},  # of two key/value heads
    "dp2": {"data": 2},
    "pp2_zbv_tp2": {"pipeline": 2, "schedule": "zbv", "tensor": 2},
    "pp2_1f1b_dp2": {"pipeline": 2, "schedule": "1f1b", "data": 2},
}


def world(layout: str) -> int:
    sizes = LAYOUTS[layout]
    return int(sizes.get("pipeline", 1) * sizes.get("tensor", 1) * sizes.get("data", 1))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """A run of two steps in float32 under pipeline 2 (V), which recorded its own held-out loss of 5 rows."""
    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = {"layout": "pp2_zbv", "data": str(tiny_dataset), "run_dir": str(run), "steps": STEPS, "stops": [],
                 "overrides": {"train.dtype": "float32"}}
    run_jobs(2, [{"name": "train", "task": "train", "arguments": arguments}], run.parent / "pool")
    return run


@pytest.fixture(scope="session")
def results(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[Any]]:
    """(layout, rows) -> the result on each rank."""

    @cache
    def of_world(size: int) -> dict[str, list[Any]]:
        folder = tmp_path_factory.mktemp(f"evaluate{size}")
        jobs = []
        for layout in [name for name in LAYOUTS if world(name) == size]:
            for rows in ROWS:
                arguments = {"checkpoint": str(trained), "parallel": LAYOUTS[layout], "sequences": rows, "micro_batch": 2,
                             "output": str(folder / "unused.json")}
                jobs.append({"name": f"{layout}-{rows}", "task": "evaluate", "arguments": arguments})
        return run_jobs(size, jobs, folder)

    return lambda layout, rows: of_world(world(layout))[f"{layout}-{rows}"]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["rows"] == expected["rows"]
    assert len(found["depths"]) == len(expected["depths"]) == 3
    for got, want in zip(found["depths"], expected["depths"], strict=True):
        assert got.keys() == want.keys()
        assert got["targets"] == want["targets"] > 0
        for key in want:
            assert got[key] == pytest.approx(want[key], rel=TOLERANCE), key


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_any_layout_gives_the_numbers_of_one_process(results: Any, layout: str, rows: int) -> None:
    [expected] = results("single", rows)
    assert expected["rows"] == rows
    for found in results(layout, rows):
        assert_same(found, expected)


def test_more_rows_are_other_numbers(results: Any) -> None:
    losses = {results("single", rows)[0]["depths"][0]["loss"] for rows in ROWS}
    assert len(losses) == len(ROWS)


def test_evaluation_is_what_the_trainer_recorded(results: Any, trained: Path) -> None:
    record = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    main, first, second = results("single", 5)[0]["depths"]
    assert record["validation/loss_main"] == pytest.approx(main["loss"], rel=TOLERANCE)
    assert record["validation/loss_depth_1"] == pytest.approx(first["loss"], rel=TOLERANCE)
    assert record["validation/accuracy_conditional_depth_2"] == pytest.approx(second["conditional_accuracy"], rel=TOLERANCE)


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "mtp_dist.evaluate", *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )


def test_command_line(trained: Path, tmp_path: Path, results: Any) -> None:
    """Processes by torchrun, and one in place; the result where it was asked for, or in the run folder and nowhere else."""
    before = sorted(trained.parent.iterdir())
    single = command(f"checkpoint={trained}", "sequences=7", "micro_batch=2", "launch.device=cpu")
    assert single.returncode == 0, single.stderr
    assert sorted(trained.parent.iterdir()) == before
    [written] = (trained / "evaluation").glob("*.json")
    arguments = ["sequences=7", "micro_batch=2", "parallel=v2", "launch.device=cpu"]
    two = command(f"checkpoint={trained}", *arguments, f"output={tmp_path / 'x.json'}")
    assert two.returncode == 0, two.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.yaml"]
    for done, file in ((single, written), (two, tmp_path / "x.json")):
        found = json.loads(file.read_text())
        assert_same(found, results("single", 7)[0])
        assert found["dtype"] == "float32"
        for entry in found["depths"]:
            assert f"{entry['loss']:.4f}" in done.stdout


def test_a_terminal_shows_the_rows_done(trained: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    arguments = [f"checkpoint={trained}", "sequences=7", "micro_batch=2", "launch.device=cpu", f"output={tmp_path / 'x.json'}"]
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        done = subprocess.run(
            [sys.executable, "-m", "mtp_dist.evaluate", *arguments],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=theirs, timeout=300,
        )
        os.close(theirs)
        shown = terminal.read(65536).decode()
    assert done.returncode == 0, shown
    assert "7/7" in shown


def refusal(config: Evaluation) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_evaluated_is_told_before_any_process_starts(trained: Path, tmp_path: Path) -> None:
    def asked(**settings: Any) -> Evaluation:
        return Evaluation(checkpoint=str(trained), **settings)

    assert "parallel.tensor=3 does not divide" in refusal(asked(parallel=ParallelConfig(tensor=3)))
    assert "8 chunks" in refusal(asked(parallel=ParallelConfig(pipeline=4)))
    assert "float16" in refusal(asked(dtype="float16"))
    assert "data=" in refusal(asked(data=str(tmp_path / "nowhere")))
    assert "split=test is not one of train or validation" in refusal(asked(split="test"))
    assert "sequences=0" in refusal(asked(sequences=0))
    assert "output=" in refusal(asked(output=str(tmp_path)))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"word {i}"}) + "\n" for i in range(50)))
    other = ShardBuild(source="jsonl", input=[str(tmp_path / "texts.jsonl")], out=str(tmp_path / "set"), validation_share=0.5)
    other.tokenizer.vocab_size = 264
    build(other)
    assert "another tokenizer" in refusal(asked(data=str(tmp_path / "set")))


def test_positions_that_cannot_be_shared_are_told_before_any_start(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(checkpoint: Path) -> TrainingRun:
        run = load_settings(checkpoint)
        run.train.sequence_length = 15
        return run

    monkeypatch.setattr(evaluate, "load_settings", odd)
    layout = ParallelConfig(tensor=2, sequence_parallel=True)
    assert "parallel.tensor=2 does not divide train.sequence_length=15" in refusal(
        Evaluation(checkpoint=str(trained), parallel=layout)
    )


@pytest.mark.parametrize("task", ["humaneval", "decode"])
def test_tasks_of_one_process_refuse_a_layout(trained: Path, task: str) -> None:
    with pytest.raises(UserError, match=f"task={task} decodes in one process, and this layout has 2; choose parallel=single"):
        evaluate.launch(Evaluation(checkpoint=str(trained), task=task, parallel=ParallelConfig(pipeline=2)))


@pytest.mark.parametrize(("wanted", "given"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (8, 8), (9, 12)])
def test_interleaved_micro_batches_make_equal_rounds(wanted: int, given: int) -> None:
    assert equal_rounds(wanted, ParallelConfig(pipeline=4, schedule="interleaved")) == given
    assert equal_rounds(wanted, ParallelConfig(pipeline=4, schedule="zbv")) == wanted


def test_a_checkpoint_outside_a_run_needs_a_place_for_its_result(trained: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "copied"
    shutil.copytree(trained / "checkpoints" / f"step_{STEPS:08d}", checkpoint)
    assert "output=FILE.json" in refusal(Evaluation(checkpoint=str(checkpoint)))
    assert prepare(Evaluation(checkpoint=str(checkpoint), output=str(tmp_path / "x.json"))).checkpoint == str(checkpoint)
    damaged = next(checkpoint.glob("rank_*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert f"{damaged.name}: its SHA-256" in refusal(Evaluation(checkpoint=str(checkpoint), output=str(tmp_path / "x.json")))
