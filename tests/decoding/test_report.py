"""The report says what was counted and measured, its parts agree; what cannot be done is one line before any weight is read."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtp_dist.config.command import application
from mtp_dist.config.schema import DecodeConfig, Evaluation, MTPConfig
from mtp_dist.decode_report import CACHE_ROWS, NAMES
from mtp_dist.decoding import costs as costs_module
from mtp_dist.decoding.costs import Costs, measure
from mtp_dist.evaluate import launch
from tests.decoding.models import random_model, taught
from tests.decoding.test_generate import SENTENCE, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_folder = tmp_path_factory.mktemp("run")
    chunk = taught(random_model(2, std=0.02, vocabulary=257), list(SENTENCE.encode()), steps=60)
    save(run_folder / "checkpoints" / "step_00000060", chunk, MTPConfig(depth=2))
    (run_folder / "prompts.jsonl").write_text('"fox jump"\n"gray f"\n"ed g"\n')
    return run_folder


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        application("evaluate", Evaluation, launch, argv=("task=decode", *arguments))
    return int(exit_.value.code or 0)  # type: ignore[arg-type]


def test_a_report(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"checkpoint={checkpoint}", f"file={checkpoint}/prompts.jsonl", "decode.max_new_tokens=20", "decode.batch=2"]
    assert command(*arguments, "decode.draft=3") == 0
    shown = capsys.readouterr().out
    place = checkpoint / "evaluation" / "step_00000060.decode"
    assert f"written to {place}" in shown
    assert {path.name for path in place.iterdir()} == set(NAMES)
    (result,) = json.loads((place / "report.json").read_text())["parts"]
    fast = result["speculative"]
    assert (result["prompts"], result["identical"], result["gamma"], fast["tokens"]) == (3, 3, 3, 60)
    assert len(fast["acceptance"]) == 3
    assert len(result["verify_cost"]) == 4
    assert result["verify_cost"][0] == 1
    expected = fast["tokens_per_forward"] / (result["verify_cost"][3] + 3 * result["draft_cost"])
    assert result["expected_speedup"] == pytest.approx(expected)
    assert result["measured_speedup"] == pytest.approx(fast["tokens_per_second"] / result["plain"]["tokens_per_second"])
    text = (place / "report.md").read_text()
    assert text in shown
    assert f"| tokens a forward | 1.00 | {fast['tokens_per_forward']:.2f} |" in text
    moved = [mode["cache_bytes_per_token"] for mode in (result["plain"], fast)]
    for name, title in CACHE_ROWS.items():
        assert f"| {title} | {moved[0][name]:,.0f} | {moved[1][name]:,.0f} |" in text
    # Keys and values of 2 heads of width 8 in 2 layers, in float32: a position each token, more with drafts.
    assert moved[0]["trunk_written"] == 2 * 2 * 2 * 8 * 4 < moved[1]["trunk_written"]
    assert moved[0]["trunk_read"] > moved[1]["trunk_read"]
    assert moved[0]["drafter_read"] == 0 < moved[1]["drafter_read"]
    assert (place / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_on_trees(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cost of a forward is that of all its nodes; acceptance is by depth."""
    arguments = [f"checkpoint={checkpoint}", f"file={checkpoint}/prompts.jsonl", "decode.max_new_tokens=16", f"output={tmp_path}"]
    assert command(*arguments, "decode.tree=dynamic", "decode.tree_nodes=5") == 0
    (result,) = json.loads((tmp_path / "report.json").read_text())["parts"]
    fast = result["speculative"]
    assert (result["identical"], result["gamma"], result["nodes"], len(fast["acceptance"])) == (3, 2, 5, 2)
    assert len(result["verify_cost"]) == 6
    assert sum(fast["drafted"]) < fast["nodes"] <= 5 * fast["forwards"]
    expected = fast["tokens_per_forward"] / (result["verify_cost"][5] + 5 * result["draft_cost"])
    assert result["expected_speedup"] == pytest.approx(expected)
    assert "drafts by heads in dynamic trees of 5 nodes, γ = 2" in capsys.readouterr().out


def test_sets_and_temperatures(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each part is what a report of it alone counts: no set or temperature leaks into another."""
    (checkpoint / "other.txt").write_text("brown fox\n---\nlazy dog")
    files = [f"{checkpoint}/prompts.jsonl", f"{checkpoint}/other.txt"]
    short = [f"checkpoint={checkpoint}", "decode.max_new_tokens=12"]
    assert command(*short, f"files=[{','.join(files)}]", "temperatures=[0,1.5]", f"output={tmp_path}/all") == 0
    parts = json.loads((tmp_path / "all" / "report.json").read_text())["parts"]
    assert [(part["file"], part["temperature"], part["prompts"]) for part in parts] == [
        (file, temperature, count) for file, count in zip(files, (3, 2), strict=True) for temperature in (0, 1.5)
    ]
    for part in parts:
        alone = [f"file={part['file']}", f"decode.temperature={part['temperature']}", f"output={tmp_path}/one"]
        assert command(*short, *alone) == 0
        (one,) = json.loads((tmp_path / "one" / "report.json").read_text())["parts"]
        assert one["speculative"]["accepted"] == part["speculative"]["accepted"]
        assert one["speculative"]["tokens"] == part["speculative"]["tokens"]
    text = (tmp_path / "all" / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("## ") == 4
    assert text.count(f"| {files[1]} | 1.5 |") == 1


def test_expected_speedup_by_hand() -> None:
    costs = Costs([2.0, 2.2, 2.6], 0.4)
    assert costs.curve == [1, 1.1, 1.3]
    assert costs.draft_cost == pytest.approx(0.2)
    assert costs.speedup(2.55, 2) == pytest.approx(2.55 / 1.7)


def test_costs_by_a_clock_that_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass and each draft is between two looks at the clock: here every look takes a second."""

    def ticks() -> Iterator[float]:
        yield from map(float, range(10**6))

    clock = ticks()
    monkeypatch.setattr(costs_module, "clock", lambda device: next(clock))
    found = measure(random_model(2), [[1, 2, 3], [4]], DecodeConfig(mode="both"), 2)
    assert found.verify == [1, 1, 1]
    # A second for the drafts of a round and one for what follows, shared by two drafts.
    assert found.draft == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint={run}"], "file is empty; give it: file=PROMPTS.jsonl"),
        (["checkpoint={run}", "file=a", "files=[b]"], "both name prompts; choose one of them"),
        (["checkpoint={run}", "file={run}/prompts.jsonl", "temperatures=[0,-1]"], "-1.0 must be 0, or a number from"),
        (["checkpoint={run}", "file=nowhere.jsonl"], "prompt_file=nowhere.jsonl cannot be read"),
        (["checkpoint={run}", "file={run}/prompts.jsonl", "output={run}/prompts.jsonl"], "is a file; with task=decode"),
        (["checkpoint={run}", "file={run}/prompts.jsonl", "decode.draft=0"], "decode.draft=0 must be a whole number from 1"),
        (["checkpoint={run}", "file={run}/prompts.jsonl", "decode.mode=plain"], "decode.mode=plain has no effect with"),
        (["checkpoint={run}", "file={run}/prompts.jsonl", "sequences=8"], "sequences=8 has no effect with task=decode"),
        (["checkpoint=nowhere", "file={run}/prompts.jsonl"], "checkpoint=nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", None)  # weights cannot be loaded without it
    assert command(*(argument.format(run=checkpoint) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
