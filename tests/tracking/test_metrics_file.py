"""Promise: metrics.jsonl holds each step exactly once, in order, whatever kills and resumes a run went through."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.tracking.jsonl import MetricsFile, read_records


def write(path: Path, steps: range, resume_step: int, mark: float) -> None:
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.append(step, {"loss/total": mark + step})
    file.close()


def test_resume_cuts_the_steps_that_are_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8), 0, mark=0.0)
    write(path, range(5, 11), 4, mark=100.0)
    records = read_records(path)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["loss/total"] for record in records] == [1, 2, 3, 4, 105, 106, 107, 108, 109, 110]
    assert all(next(iter(json.loads(line))) == "step" for line in path.read_text().splitlines())


@settings(deadline=None)
@given(segments=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=6))
def test_any_sequence_of_kills_leaves_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, segments: list[tuple[int, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    reached = 0
    for length, back, torn in segments:
        resume = max(0, reached - back)
        write(path, range(resume + 1, resume + length + 1), resume, mark=0.0)
        reached = resume + length
        content = path.read_bytes()
        path.write_bytes(content[: max(0, len(content) - torn)])  # the kill: the end of the file never reached the disk
        reached = min(reached, max([record["step"] for record in read_records(path)], default=0))
    MetricsFile(path, reached).close()
    assert [record["step"] for record in read_records(path)] == list(range(1, reached + 1))
    assert path.read_bytes().endswith(b"\n") or reached == 0


def test_a_torn_last_line_is_cut_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss/total": 3.0}\n{"step": 2, "loss/to')
    write(path, range(2, 3), 2, mark=0.0)
    assert [record["step"] for record in read_records(path)] == [1, 2]
    assert "1 unfinished line" in caplog.text


def test_a_line_that_is_whole_but_for_its_newline_does_not_glue_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss/total": 3.0}')
    write(path, range(1, 3), 1, mark=0.0)
    assert [record["loss/total"] for record in read_records(path)] == [1.0, 2.0]


def test_a_step_has_one_record(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.append(3, {"loss/total": 1.0})
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"step {step} is logged already"):
            file.append(step, {"loss/total": 1.0})


def test_non_finite_values_are_strict_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.append(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    file.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (record,) = read_records(path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"], record["d"]) == (math.inf, -math.inf, 0.1)


def test_every_record_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 4):
        file.append(step, {"loss/total": 1.0})
        assert len(read_records(path)) == step
