"""Promise: one command trains, a signal stops it with everything saved, the same command goes on; metrics.jsonl and wandb then
hold each step once, with every promised number, and nothing lies outside the run folder.

The metric names are spelled out here: plots and people depend on them.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config.schema import ShardBuild, TokenizerConfig
from mtp_dist.data.building import build
from mtp_dist.exit_codes import STOPPED
from mtp_dist.tracking.starts import read_starts

STEPS, ROWS, LENGTH = 150, 4, 16
VALIDATE_EVERY = 50
EACH_STEP = (
    "loss/total",
    "loss/main",
    "loss/depth_1",
    "loss/depth_2",
    "accuracy/main",
    "accuracy/depth_1",
    "accuracy/depth_2",
    "accuracy_conditional/depth_1",
    "accuracy_conditional/depth_2",
    "optim/lr",
    "optim/gradient_norm",
    "optim/skipped_steps",
    "mtp/main_loss_weight",
    "mtp/loss_weight",
    "mtp/scheduled_sampling",
    "mtp/depth",
    "data/tokens_seen",
    "data/epoch",
    "speed/tokens_per_second",
    "time/step",
    "time/data_wait",
    "time/forward_backward",
    "time/optimizer",
    "memory/rss_gib",
)
VALIDATION = (
    "validation/loss_total",
    "validation/loss_main",
    "validation/loss_depth_1",
    "validation/loss_depth_2",
    "validation/accuracy_main",
    "validation/accuracy_depth_1",
    "validation/accuracy_depth_2",
    "validation/accuracy_conditional_depth_1",
    "validation/accuracy_conditional_depth_2",
    "time/validation",
)


@dataclass
class Stopped:
    """What was there after the signal, and what after the second start."""

    run: Path
    base: Path
    home: Path
    first_status: dict[str, Any]
    first_steps: list[int]
    first_checkpoints: list[str]
    second_output: str


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """A run that was asked to stop once it had logged 3 of its 150 steps, and started again by the same command."""
    base = tmp_path_factory.mktemp("tracked")
    texts, home = base / "texts", base / "home"
    texts.mkdir()
    home.mkdir()
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for number in range(60):
        (texts / f"{number:02}.txt").write_text(" ".join(words[(number * i + i) % 10] for i in range(12 + number % 9)))
    tokenizer = TokenizerConfig(kind="bytes")
    build(ShardBuild(source="text", input=[str(texts)], out=str(base / "data"), validation_share=0.2, tokenizer=tokenizer))
    run = base / "runs" / "one"
    command = [
        *(sys.executable, "-m", "mtp_dist.train", f"run_dir={run}", f"data.path={base / 'data'}"),
        *("model.layers=2", "model.hidden=16", "model.mlp=24", "model.heads=2", "model.kv_heads=1", "train.dtype=float32"),
        *(f"train.steps={STEPS}", f"train.global_batch={ROWS}", "train.micro_batch=2", f"train.sequence_length={LENGTH}"),
        *("data.lanes=4", "data.block_samples=8", f"validation.every_steps={VALIDATE_EVERY}", "validation.sequences=6"),
        *(f"schedule.warmup_tokens={8 * ROWS * LENGTH}", f"mtp.loss_weight_points=[[{100 * ROWS * LENGTH},0.1]]"),
        f"mtp.main_loss_weight_points=[[{120 * ROWS * LENGTH},0.5]]",
        f"mtp.scheduled_sampling_points=[[{60 * ROWS * LENGTH},0.75]]",
        *("launch.device=cpu", "launch.threads=1"),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "XDG"))}
    environment["HOME"] = str(home)
    first = subprocess.Popen(command, cwd=base, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(records(run)) < 3:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == STOPPED, output
    steps = [record["step"] for record in records(run)]
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    was = status(run)
    second = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    return Stopped(run, base, home, was, steps, checkpoints, second.stdout)


def test_the_signal_stopped_it_half_way_with_a_checkpoint(stopped: Stopped) -> None:
    last = stopped.first_steps[-1]
    assert 3 <= last < STEPS
    assert stopped.first_status == {"state": "stopped", "step": last, "total": STEPS}
    assert stopped.first_checkpoints == ["latest", f"step_{last:08d}"]


def test_the_same_command_went_on_and_finished(stopped: Stopped) -> None:
    assert f"at step {stopped.first_steps[-1]}" in stopped.second_output
    assert status(stopped.run) == {"state": "finished", "step": STEPS, "total": STEPS}
    assert (stopped.run / "checkpoints" / "latest").read_text().strip() == f"step_{STEPS:08d}"
    assert not list(stopped.run.glob("resolved.*.yaml")), "the same settings were frozen twice"


def test_each_start_is_on_record(stopped: Stopped) -> None:
    assert [start["step"] for start in read_starts(stopped.run)] == [0, stopped.first_steps[-1]]


def test_metrics_file_holds_every_number_of_every_step(stopped: Stopped) -> None:
    found = records(stopped.run)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for record in found:
        wanted = {"step", *EACH_STEP, *(VALIDATION if record["step"] % VALIDATE_EVERY == 0 else ())}
        assert set(record) == wanted
        assert all(math.isfinite(value) for value in record.values())


def test_the_numbers_mean_what_they_say(stopped: Stopped) -> None:
    """No outside truth is needed for these: they follow from each other and from the settings."""
    tokens = ROWS * LENGTH
    for record in records(stopped.run):
        step = record["step"]
        weight = 0.3 if (step - 1) * tokens < 100 * tokens else 0.1
        assert record["mtp/loss_weight"] == weight
        main = 1.0 if step <= 120 else 0.5
        assert record["mtp/main_loss_weight"] == main
        assert record["mtp/scheduled_sampling"] == (0.0 if step <= 60 else 0.75)
        assert record["mtp/depth"] == 2
        depths = (record["loss/depth_1"] + record["loss/depth_2"]) / 2
        assert record["loss/total"] == pytest.approx(main * record["loss/main"] + weight * depths, rel=1e-5)
        assert record["data/tokens_seen"] == step * tokens
        assert record["optim/lr"] <= 1e-3
        assert step > 8 or record["optim/lr"] == pytest.approx(1e-3 * step / 8)
        assert record["speed/tokens_per_second"] * record["time/step"] == pytest.approx(tokens)
        parts = [record[f"time/{name}"] for name in ("data_wait", "forward_backward", "optimizer")]
        assert min(parts) >= 0 and 0 < sum(parts) <= record["time/step"]
        assert record.get("time/validation", 1) > 0
        assert 0 < record["memory/rss_gib"] < 64
        assert record["optim/gradient_norm"] > 0
        assert record["optim/skipped_steps"] == 0
    first, last = records(stopped.run)[0], records(stopped.run)[-1]
    assert first["loss/main"] == pytest.approx(math.log(257), rel=0.05), "an untrained model knows nothing"
    for name in ("loss/main", "loss/depth_1", "loss/depth_2"):
        assert last[name] < first[name] - 0.1, "nothing was learned"


def test_wandb_holds_the_same(stopped: Stopped) -> None:
    """Two segments, one run: wandb's own reader gives back each step once with the numbers of metrics.jsonl."""
    rows: dict[int, dict[str, float]] = {}
    ids = []
    segments = list((stopped.run / "wandb").glob("offline-run-*"))
    assert len(segments) == 2
    for segment in segments:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
        environment = {**os.environ, "WANDB_DIR": str(stopped.run), "HOME": str(stopped.base)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=stopped.run, env=environment, check=True)
        for record in map(json.loads, done.stdout.splitlines()):
            if record["type"] == "run":
                ids.append(record["run"]["run_id"])
                assert record["run"]["config"]["update"]["train"]["steps"] == STEPS
            if record["type"] == "history":
                item = record["history"]["item"]
                assert item["_step"] not in rows, "a step was sent twice"
                rows[item["_step"]] = {name: value for name, value in item.items() if not name.startswith("_")}
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert rows == {record.pop("step"): record for record in records(stopped.run)}


def test_nothing_lies_outside_the_run_folder(stopped: Stopped) -> None:
    assert not list(stopped.home.rglob("*"))
    assert sorted(path.name for path in stopped.base.iterdir()) == ["data", "home", "runs", "texts"]
    assert [path.name for path in (stopped.base / "runs").iterdir()] == ["one"]
    found = sorted(path.name for path in stopped.run.iterdir())
    assert found == [".lock", "checkpoints", "metrics.jsonl", "resolved.yaml", "starts.jsonl", "status.json", "wandb"]
