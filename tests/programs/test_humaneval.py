"""Promise: pass@k is the unbiased estimate of what the tests of a problem say; nothing is run without leave; wrong input is
named."""

import gzip
import itertools
import json
import math
import re
from pathlib import Path

import pytest

from mtp_dist.config.compose import compose
from mtp_dist.config.schema import Evaluation, MTPConfig
from mtp_dist.errors import UserError
from mtp_dist.evaluate import launch
from mtp_dist.programs.pass_at_k import mean_pass_at_k, pass_at_k
from mtp_dist.programs.problems import read_problems, truncated
from tests.decoding.models import random_model, taught
from tests.decoding.test_generate import save

PROBLEMS = [
    {
        "task_id": "own/add",
        "prompt": 'def add(a, b):\n    """The sum."""\n',
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
        "entry_point": "add",
    },
    {
        "task_id": "own/largest",
        "prompt": 'def largest(values):\n    """The largest of some numbers."""\n',
        "canonical_solution": "    return max(values)\n",
        "test": "def check(candidate):\n    assert candidate([1, 7, 3]) == 7\n",
        "entry_point": "largest",
    },
]
WRITTEN = {
    "own/add": ["    return a + b\n", "    return a - b\n", "    return sum((a, b))\n"],
    "own/largest": ["    while True: pass\n", "    return values[-1]\n", "    return sorted(values)[-1]\n"],
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    rows = [{"task_id": task, "completion": text} for task, texts in WRITTEN.items() for text in texts]
    (tmp_path / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def evaluation(files: Path, *settings: str) -> Evaluation:
    common = ["task=humaneval", f"file={files / 'problems.jsonl'}", f"programs.completions={files / 'written.jsonl'}"]
    return compose("evaluate", Evaluation, [*common, "programs.seconds=2", *settings])


def test_the_estimate_is_the_mean_over_all_choices() -> None:
    """All ways to choose k of n programs, counted."""
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                choices = list(itertools.combinations(range(n), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(min(chosen) < c for chosen in choices) / len(choices))
    assert pass_at_k(200, 1, 100) == pytest.approx(1 - math.comb(199, 100) / math.comb(200, 100))
    assert mean_pass_at_k([0, 2], 2, 1) == 0.5
    with pytest.raises(ValueError, match="k=3"):
        pass_at_k(2, 1, 3)


def test_the_command_says_what_passed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = files / "result.json"
    assert launch(evaluation(files, "programs.allow=true", "programs.k=[1,2,3]", f"output={output}")) == 0
    said = capsys.readouterr()
    assert "warning: running programs that nobody has read" in said.err
    result = json.loads(output.read_text())
    assert [problem["passed"] for problem in result["problems"]] == [[True, False, True], [False, False, True]]
    assert result["pass_at_k"] == pytest.approx({"1": (2 / 3 + 1 / 3) / 2, "2": (1 + 2 / 3) / 2, "3": 1.0})
    assert "pass@1: 50.0 % of 2 problems, 3 programs each" in said.out


def test_a_models_own_programs_are_written_and_judged(tmp_path: Path) -> None:
    """A model that knows one program by heart; drafting does not change what it writes."""
    text = "def add(a, b):\n    return a + b\n"
    chunk = taught(random_model(2, std=0.02, vocabulary=257 + 7), list(text.encode()), steps=150)
    save(tmp_path / "checkpoints" / "step_00000001", chunk, MTPConfig(depth=2))
    problem = {**PROBLEMS[0], "prompt": "def add(a, b):\n"}
    (tmp_path / "one.jsonl").write_text(json.dumps(problem) + "\n")
    found = []
    for how in ([], ["decode.mode=plain"], ["decode.drafter=model", f"decode.draft_model={tmp_path}"], ["decode.auto=true"]):
        settings = ["task=humaneval", f"file={tmp_path / 'one.jsonl'}", f"checkpoint={tmp_path}", "programs.allow=true"]
        settings += ["decode.max_new_tokens=40", f"output={tmp_path / 'result.json'}", *how]
        assert launch(compose("evaluate", Evaluation, settings)) == 0
        found.append(json.loads((tmp_path / "result.json").read_text()))
    assert all(each == found[0] for each in found)
    assert found[0]["pass_at_k"] == {"1": 1.0}
    assert found[0]["problems"][0]["completions"] == ["    return a + b"]


def test_nothing_runs_without_leave(files: Path) -> None:
    with pytest.raises(UserError, match=r"programs\.allow=true"):
        launch(evaluation(files))


def test_gzipped_problems_are_the_same(files: Path) -> None:
    packed = files / "problems.jsonl.gz"
    packed.write_bytes(gzip.compress((files / "problems.jsonl").read_bytes()))
    assert read_problems(str(packed)) == read_problems(str(files / "problems.jsonl"))


def test_a_completion_ends_where_it_leaves_the_function() -> None:
    assert truncated("    return 1\n\ndef other():\n    pass\n") == "    return 1\n"
    assert truncated("    if a:\n        return 1\nprint(2)\nclass A: pass") == "    if a:\n        return 1"
    assert truncated("    return 1\n    # a note\n") == "    return 1\n    # a note\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["file=nothing.jsonl"], "file=nothing.jsonl cannot be read"),
        (["file="], "file is empty"),
        (["task=humanevil"], "did you mean humaneval?"),
        (["programs.k=[4]"], "programs.k=4 must be from 1 to the 3 programs"),
        (["programs.completions=", "programs.samples=5", "checkpoint=nowhere"], "checkpoint=nowhere"),
        (["programs.seconds=0"], "programs.seconds=0"),
        (["programs.samples=3"], "programs.samples=3 has no effect beside programs.completions="),
        (["decode.max_new_tokens=9"], "decode.max_new_tokens=9 has no effect beside programs.completions="),
        (["temperatures=[1]"], "has no effect with task=humaneval; leave it out, or choose task=decode"),
        (["split=train"], "split=train has no effect with task=humaneval; leave it out, or choose task=held_out"),
        (["task=held_out", "programs.completions="], "has no effect with task=held_out; leave it out"),
    ],
)
def test_wrong_settings_are_named(files: Path, settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        launch(evaluation(files, "programs.allow=true", *settings))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no json", r"line 3 cannot be read \(not JSON"),
        ('{"task_id": "a"}', "line 3 must have the texts"),
        (json.dumps(PROBLEMS[0]), "two problems"),
        ("[" * 100_000, "line 3 cannot be read .*nested too deeply"),
        (json.dumps({**PROBLEMS[0], "test": "a\ud800"}), "line 3.*half of a surrogate pair"),
    ],
)
def test_damaged_problems_are_named(files: Path, line: str, words: str) -> None:
    with (files / "problems.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=words):
        read_problems(str(files / "problems.jsonl"))
