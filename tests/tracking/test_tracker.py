"""Promises: every metric reaches wandb and TensorBoard unchanged, one run stays one run over kills and resumes, nothing is
written outside the run folder, and no failure of a backend stops a job."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtp_dist.config.schema import TrackerConfig
from mtp_dist.errors import UserError
from mtp_dist.tracking import names
from mtp_dist.tracking.jsonl import read_records
from mtp_dist.tracking.tracker import Tracker

DEPTHS = 2
SETTINGS = {"model": {"layers": 6}, "mtp": {"depth": DEPTHS}}


def full_metrics(step: int) -> dict[str, float]:
    """Every documented metric with a value that no other metric or step has."""
    expanded = [
        names.of_depth(name, depth) if name.endswith("_") else name
        for name in names.MEANING
        for depth in (range(1, DEPTHS + 1) if name.endswith("_") else [0])
    ]
    return {name: step + index / 64 for index, name in enumerate(expanded)}


def inspected(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Records of each offline segment, oldest first, as wandb's own reader prints them."""
    segments = sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime_ns)
    result = []
    for segment in segments:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=run_dir, env=os.environ | {"WANDB_DIR": str(run_dir)})
        result.append([json.loads(line) for line in done.stdout.splitlines()])
    return result


def rows(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics over all segments; asserts that no step was sent twice."""
    found: dict[int, dict[str, float]] = {}
    for segment in inspected(run_dir):
        for record in segment:
            if record["type"] == "history":
                item = record["history"]["item"]
                assert item["_step"] not in found, f"step {item['_step']} was sent twice"
                found[item["_step"]] = {name: value for name, value in item.items() if not name.startswith("_")}
    return found


def in_a_process(run_dir: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of a job in a process of its own (wandb keeps one service for each process)."""
    head = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_tracker import SETTINGS, full_metrics
        from mtp_dist.config.schema import TrackerConfig
        from mtp_dist.tracking.tracker import Tracker
        run_dir = Path({str(run_dir)!r})
    """
    script = textwrap.dedent(head) + textwrap.dedent(body)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, cwd=run_dir.parent, env=os.environ | environment, timeout=120)


def test_wandb_offline_holds_every_value_over_kill_and_resume(tmp_path: Path) -> None:
    run_dir = tmp_path / "job"
    home = tmp_path / "home"
    home.mkdir()
    killed = in_a_process(
        run_dir,
        """
        import os
        tracker = Tracker(run_dir, TrackerConfig(), settings=SETTINGS, run_id=None, resume_step=0)
        (run_dir / "id").write_text(tracker.run_id)
        for step in range(1, 301):
            tracker.log(step, full_metrics(step))
        os.kill(os.getpid(), 9)
        """,
        HOME=str(home),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_id = (run_dir / "id").read_text()
    before = rows(run_dir)
    assert 0 < len(before) <= 300

    resumed = in_a_process(
        run_dir,
        f"""
        tracker = Tracker(run_dir, TrackerConfig(), settings=SETTINGS, run_id={run_id!r}, resume_step=290)
        for step in range(291, 311):
            tracker.log(step, full_metrics(step))
        tracker.close()
        tracker.close()
        """,
        HOME=str(home),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr == ""
    assert rows(run_dir) == {step: full_metrics(step) for step in range(1, 311)}
    assert [record["step"] for record in read_records(run_dir / "metrics.jsonl")] == list(range(1, 311))

    runs = [record["run"] for segment in inspected(run_dir) for record in segment if record["type"] == "run"]
    assert [run["run_id"] for run in runs] == [run_id, run_id]
    assert runs[0]["display_name"] == "job"
    assert runs[0]["config"]["update"]["mtp"] == {"depth": DEPTHS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "job"]
    assert not list(home.rglob("*")), "wandb wrote into the home folder"


def test_the_job_goes_on_when_the_wandb_service_dies(tmp_path: Path) -> None:
    run_dir = tmp_path / "job"
    done = in_a_process(
        run_dir,
        """
        import psutil
        tracker = Tracker(run_dir, TrackerConfig(), settings=SETTINGS, run_id="abc", resume_step=0)
        tracker.log(1, full_metrics(1))
        service = psutil.Process().children(recursive=True)
        assert service
        for process in service:
            process.kill()
        psutil.wait_procs(service)
        for step in range(2, 60):
            tracker.log(step, full_metrics(step))
        tracker.close()
        print("the job ended well")
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "the job ended well" in done.stdout
    assert done.stderr.count("wandb is off for the rest of this run") == 1
    assert len(read_records(run_dir / "metrics.jsonl")) == 59


def test_the_job_goes_on_without_the_wandb_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a package that is not installed meets
    tracker = Tracker(tmp_path, TrackerConfig(), settings=SETTINGS, run_id=None, resume_step=0)
    tracker.log(1, full_metrics(1))
    tracker.log(2, full_metrics(2))
    tracker.close()
    assert caplog.text.count("wandb is off") == 1
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2


def test_online_without_a_key_warns_instead_of_asking(tmp_path: Path) -> None:
    done = in_a_process(
        tmp_path / "job",
        """
        tracker = Tracker(run_dir, TrackerConfig(wandb="online"), settings=SETTINGS, run_id=None, resume_step=0)
        tracker.log(1, full_metrics(1))
        tracker.close()
        """,
        HOME=str(tmp_path),
        WANDB_API_KEY="",
    )
    assert done.returncode == 0, done.stderr
    assert "no wandb API key" in done.stderr


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "job", TrackerConfig(), settings=SETTINGS, run_id="abc", resume_step=0, on=False)
    tracker.log(1, full_metrics(1))
    tracker.close()
    assert tracker.run_id == "abc"
    assert not list(tmp_path.iterdir())


def test_disabled_wandb_is_not_started(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    tracker = Tracker(tmp_path, TrackerConfig(wandb="disabled"), settings=SETTINGS, run_id=None, resume_step=0)
    tracker.log(1, full_metrics(1))
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    tracker.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "starts.jsonl"]
    assert len(tracker.run_id) == 8


def test_unknown_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracker\.wandb='on' is not a mode; choose offline, online, disabled"):
        Tracker(tmp_path, TrackerConfig(wandb="on"), settings={}, run_id=None, resume_step=0)


def test_tensorboard_holds_every_value(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackerConfig(wandb="disabled", tensorboard=True)
    for resume_step, steps in ((0, range(1, 6)), (3, range(4, 9))):
        tracker = Tracker(tmp_path, config, settings={}, run_id="a", resume_step=resume_step)
        for step in steps:
            tracker.log(step, full_metrics(step))
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in full_metrics(0).items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(step, value + step) for step in range(1, 9)]
