"""Promises: the report shows what metrics.jsonl holds, for a run of any length and any metrics, and needs no torch."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config.schema import TrackerConfig
from mtp_dist.errors import UserError
from mtp_dist.report import last_values, page_text, write_report
from mtp_dist.tracking import names
from mtp_dist.tracking.jsonl import MetricsFile
from mtp_dist.tracking.plots import DRAWINGS, MAIN_COLOR, START_COLOR, Series, draw_accuracy, draw_loss, running_mean
from mtp_dist.tracking.starts import read_starts
from mtp_dist.tracking.tracker import Tracker
from mtp_dist.training.status import write_status
from tests.hostile import KINDS, no_hang, put


def train_record(step: int) -> dict[str, float]:
    return {
        names.LOSS_TOTAL: 4.0 / step,
        names.LOSS_MAIN: 3.0 / step,
        names.of_depth(names.LOSS_DEPTH, 1): 3.5 / step,
        names.ACCURACY_MAIN: 0.5,
        names.of_depth(names.ACCURACY_DEPTH, 1): 0.25,
        names.of_depth(names.ACCURACY_CONDITIONAL_DEPTH, 1): 0.5,
        names.LEARNING_RATE: 1e-3,
        names.GRADIENT_NORM: 1.5,
        names.TOKENS_SEEN: 1000.0 * step,
        names.TOKENS_PER_SECOND: 500.0,
        names.STEP_TIME: 2.0,
    }


def write_run(run_dir: Path, steps: int) -> Path:
    file = MetricsFile(run_dir / "metrics.jsonl", 0)
    for step in range(1, steps + 1):
        file.append(step, train_record(step))
    file.append(steps + 1, {names.VALIDATION_LOSS_MAIN: 2.0, names.VALIDATION_LOSS_TOTAL: math.nan})
    file.close()
    return run_dir


def pixels(path: Path) -> np.ndarray:
    import matplotlib.image

    return matplotlib.image.imread(path)


@pytest.mark.parametrize("steps", [1, 2, 200])
def test_a_run_of_any_length_is_drawn(tmp_path: Path, steps: int) -> None:
    written = write_report(write_run(tmp_path, steps))
    assert [path.name for path in written] == ["loss.png", "accuracy.png", "optimizer.png", "speed.png", "report.md"]
    for path in written[:-1]:
        image = pixels(path)
        assert min(image.shape[:2]) >= 400
        assert image[..., :3].std() > 0.01, f"{path.name} is blank"


def test_curves_hold_the_logged_values(tmp_path: Path) -> None:
    records = [{"step": step} | train_record(step) for step in range(1, 6)] + [{"step": 5, names.VALIDATION_LOSS_MAIN: 2.0}]
    figure = draw_loss(Series(records))
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["total (what is differentiated)", "main (next token)", "depth 1", "validation main"]
    assert lines["main (next token)"].get_xdata().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert lines["main (next token)"].get_ydata().tolist() == [3.0 / step for step in range(1, 6)]
    assert lines["validation main"].get_xdata().tolist() == [5.0]
    assert figure.axes[0].get_xlabel() == "tokens trained (thousand)"
    assert "nats" in figure.axes[0].get_ylabel()


def test_every_axis_has_its_labels_and_many_points_their_running_mean() -> None:
    records = [{"step": step} | train_record(step) | {names.MEMORY_RSS: 1.0} for step in range(1, 31)]
    for name, draw in DRAWINGS.items():
        figure = draw(Series(records))
        assert figure is not None
        for ax in figure.axes:
            assert ax.get_xlabel() == "tokens trained (thousand)", name
            assert ax.get_ylabel(), name
            assert any(label.get_visible() for label in ax.get_xticklabels()), name
    figure = draw_loss(Series(records))
    assert figure is not None
    raw, smooth = (line for line in figure.axes[0].lines if line.get_color() == MAIN_COLOR)
    assert raw.get_ydata().tolist() == [3.0 / step for step in range(1, 31)]
    assert smooth.get_ydata().tolist() == running_mean(np.array(raw.get_ydata()), 5).tolist()
    assert (raw.get_alpha(), smooth.get_alpha()) == (0.18, None)


def test_resumes_and_the_stop_are_marked_in_every_plot() -> None:
    records = [{"step": step} | train_record(step) for step in range(1, 6)]
    for name, draw in DRAWINGS.items():
        figure = draw(Series(records, resumed=[2, 2, 4], stopped=5))
        assert figure is not None
        for ax in figure.axes:
            marks = [line.get_xdata()[0] for line in ax.lines if line.get_color() == START_COLOR]
            assert marks == [2.0, 4.0, 5.0], name
            labels = [text.get_text() for text in ax.get_legend().get_texts()]
            assert labels.count("stopped and resumed") == labels.count("stopped here") == 1, name


def test_the_report_says_when_the_run_was_started_and_where_its_time_went(tmp_path: Path) -> None:
    phases = {names.STEP_TIME: 2.0, names.DATA_WAIT: 0.25, names.FORWARD_BACKWARD_TIME: 1.0, names.OPTIMIZER_TIME: 0.5}
    for resume_step, steps in ((0, (2, 4)), (4, (6,))):
        tracker = Tracker(tmp_path, TrackerConfig(wandb="disabled"), settings={}, run_id="a", resume_step=resume_step)
        for step in steps:
            tracker.log(step, train_record(step) | phases | {names.VALIDATION_TIME: 3.0, names.SAVE_TIME: 1.0})
        tracker.close()
    write_status(tmp_path, "stopped", 6)
    assert [start["step"] for start in read_starts(tmp_path)] == [0, 4]
    page = write_report(tmp_path)[-1].read_text()
    # Every second step is logged, so each stands for two.
    for line in ("| waiting for data | 1.5 | 6.2% |", "| forward and backward | 6.0 | 25.0% |", "| optimizer | 3.0 | 12.5% |",
                 "| agreement and the rest | 1.5 | 6.2% |", "| validation | 9.0 | 37.5% |", "| saving | 3.0 | 12.5% |",
                 "| 1 | 0 | 20", "| 2 | 4 | 20", "3 records."):  # fmt: skip
        assert line in page, line


def test_a_run_of_an_earlier_version_has_neither(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, 3))[-1].read_text()
    assert "Where the time went" not in page
    assert "## Starts" not in page
    (tmp_path / "starts.jsonl").write_text('{"step": 0, "time": "x"}\nhalf a li')
    assert read_starts(tmp_path) == [{"step": 0, "time": "x"}]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "loop"])
def test_a_start_is_not_recorded_in_what_is_no_file(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "starts.jsonl")
    with no_hang(), pytest.raises(UserError, match=r"starts\.jsonl.* is a .*, not a regular file"):
        Tracker(tmp_path, TrackerConfig(wandb="disabled"), settings={}, run_id=None, resume_step=0)


def test_a_run_without_depths_has_one_accuracy_panel() -> None:
    figure = draw_accuracy(Series([{"step": 1, names.ACCURACY_MAIN: 0.5}]))
    assert figure is not None
    assert len(figure.axes) == 1
    assert figure.axes[0].get_xlabel() == "optimizer step"


@given(values=st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), min_size=1, max_size=50), width=st.integers(1, 10))
def test_running_mean_is_the_mean_of_the_window(values: list[float], width: int) -> None:
    result = running_mean(np.array(values), width)
    for index, mean in enumerate(result):
        window = [value for value in values[max(0, index - width + 1) : index + 1] if not math.isnan(value)]
        if window:
            assert mean == pytest.approx(sum(window) / len(window), abs=1e-9)
        else:
            assert math.isnan(mean)


def test_the_table_holds_the_last_value_of_each_metric() -> None:
    records = [
        {"step": 1, "loss/main": 3.0, "validation/loss_depth_2": 2.5, "own/metric": 1.0},
        {"step": 2, "loss/main": 2.0, "loss/depth_2": math.inf},
    ]
    assert list(last_values(records).items()) == [
        ("loss/main", (2.0, 2)),
        ("loss/depth_2", (math.inf, 2)),
        ("validation/loss_depth_2", (2.5, 1)),
        ("own/metric", (1.0, 1)),
    ]
    page = page_text("job", records, [Path("loss.png")])
    assert "| `validation/loss_depth_2` | 2.5 | 1 | loss/depth_k on the held-out split. |" in page
    assert "![loss](loss.png)" in page


def test_a_folder_without_metrics_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no metrics"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "absent")


def test_the_command_writes_where_it_is_told_and_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    script = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_module('mtp_dist.report', run_name='__main__')"
    command = [sys.executable, "-c", script, f"run_dir={tmp_path}", f"output={tmp_path / 'plots'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "plots" / name) for name in
                                   ("loss.png", "accuracy.png", "optimizer.png", "speed.png", "report.md")]
    assert (tmp_path / "plots" / "report.md").is_file()
