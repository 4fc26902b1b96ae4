"""Promise: nothing that is no file hangs its reader or is read without limit, in the place of any file that a command reads; and
a file of a run that someone else wrote gives one line at most, never a traceback."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config.compose import load
from mtp_dist.config.schema import DecodeConfig, Generation, TrainingRun
from mtp_dist.data.tokenizer import load_tokenizer
from mtp_dist.decoding.request import read_prompts
from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, parsed, typed
from mtp_dist.programs.problems import read_problems
from mtp_dist.run_lock import held
from mtp_dist.tracking.jsonl import LONGEST, METRICS_FILE, MetricsFile, read_records
from mtp_dist.training.status import STATUS, read_status
from tests.hostile import KINDS, no_hang, put


def lock(path: Path) -> None:
    with held(path.parent):
        pass


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "settings": ("resolved.yaml", lambda path: load(path, TrainingRun)),
    "prompts": ("prompts.txt", lambda path: read_prompts(Generation(prompt_file=str(path), decode=DecodeConfig()))),
    "problems": ("problems.jsonl", lambda path: read_problems(str(path))),
    "packed problems": ("problems.jsonl.gz", lambda path: read_problems(str(path))),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "lock": (".lock", lock),
    "metrics": (METRICS_FILE, read_records),
    "metrics that go on": (METRICS_FILE, lambda path: MetricsFile(path, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file(tmp_path: Path, reader: str, kind: str) -> None:
    name, read = READERS[reader]
    put(kind, tmp_path / name)
    with no_hang(), pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_that_is_no_file_says_nothing(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / STATUS)
    with no_hang():
        assert read_status(tmp_path) is None


@pytest.mark.parametrize("content", ["[]", "1", "[" * 50_000, '{"state": [1]}', '{"state": ' + "9" * 5000 + "}", "\udcff"])
def test_a_status_of_another_form_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / STATUS).write_bytes(content.encode(errors="surrogateescape"))
    assert read_status(tmp_path) is None
    (tmp_path / STATUS).write_text('{"state": "stopped", "step": 3}')
    found = read_status(tmp_path)
    assert found is not None and found.state == "stopped"


@pytest.mark.parametrize("reader", ["settings", "prompts", "problems", "tokenizer"])
def test_a_file_without_end(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 42)
    with no_hang(), pytest.raises(UserError, match=name):
        read(tmp_path / name)


def test_problems_that_unpack_without_end(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(129):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 22
    with no_hang(), pytest.raises(UserError, match=r"more than 128 MiB"):
        read_problems(str(path))


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"task_id": ' + "9" * 5000 + "}", '{"task_id": "\\ud800"}', '{"task_id": 1, "task_id": 2}', "NaN", "[]"],
    ids=range(6),
)
def test_problems_of_another_form(tmp_path: Path, line: str) -> None:
    (tmp_path / "problems.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1"):
        read_problems(str(tmp_path / "problems.jsonl"))


def test_metrics_of_another_form_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    deep, digits = "[" * 50_000, '{"step": ' + "9" * 5000 + "}"
    odd = [deep, digits, '{"step": 2, "loss": [1]}', '{"step": true}', '{"step": 2, "loss": "much"}']
    lines = ['{"step": 1, "loss": "NaN"}', *odd, "x" * (2 * LONGEST), '{"step": 3, "loss": 2.5}']
    path.write_text("".join(line + "\n" for line in lines))
    assert [record["step"] for record in read_records(path)] == [1, 3]
    assert MetricsFile(path, 9).last_step == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("1", bool),
        ("true", int),
        ("1.0", int),
        ('"1"', int),
        ("null", str),
        ("[1, 2.5]", list[int]),
        ('{"a": null}', dict[str, int]),
        ("[]", dict[str, int]),
        ("true", int | float | str),
    ],
)
def test_types_are_kept_apart(content: str, kind: Any) -> None:
    with pytest.raises(FormError, match="not "):
        typed(parsed(content), kind)


def test_types_that_fit() -> None:
    assert typed(parsed('{"a": [1, 2.5], "b": []}'), dict[str, list[float]]) == {"a": [1, 2.5], "b": []}
    assert typed(parsed("null"), int | None) is None
    assert typed(parsed("7"), int | None) == 7
    assert parsed('"\\ud83d\\ude00"') == "😀"
    assert parsed("[NaN]", nonfinite=True)[0] != 0
