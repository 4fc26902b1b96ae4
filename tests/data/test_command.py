"""`python data/build_shards.py`: builds, finds complete, and answers bad input in one line with status 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from mtp_dist.data.dataset import Dataset

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "data/build_shards.py", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_it_builds_the_standard_library_and_then_does_nothing(tmp_path: Path) -> None:
    arguments = (f"out={tmp_path / 'stdlib'}", "limit_mb=1", "tokenizer.vocab_size=512", "workers=1")
    first, second = command(*arguments), command(*arguments)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "built" in first.stdout
    assert "complete already" in second.stdout
    assert first.stderr == ""  # no bars where there is no terminal
    dataset = Dataset.open(tmp_path / "stdlib")
    assert dataset.vocab_size == 512
    assert dataset.split("train").tokens > 100_000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["source=jsonl", "out={}", "input=[nowhere]"], "input=nowhere"),
        (["out={}", "limit_mb=much"], "limit_mb"),
        (["out={}", "soruce=text"], "soruce"),
        ([], "out is empty"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], named: str) -> None:
    result = command(*(argument.format(tmp_path / "out") for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
