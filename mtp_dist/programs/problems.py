"""Problems and completions in HumanEval's format, JSON lines (https://github.com/openai/human-eval).

A problem: task_id, prompt (a function's head and docstring), test (defines `check(candidate)`), entry_point (the function's
name). A completion: task_id, completion (what follows the prompt). Files may be gzipped.
"""

import gzip
import zlib
from dataclasses import dataclass
from typing import Any

from mtp_dist.config.rules import whole_text
from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, parsed
from mtp_dist.regular_file import MIB, open_regular

LARGEST = 128 * MIB
"""Of a file, unpacked: HumanEval has 0.2 MiB."""

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion has left its function (Chen and others, arXiv 2107.03374, section 3.2 of the evaluation's code)."""


@dataclass(frozen=True)
class Problem:
    task: str
    prompt: str
    test: str
    entry_point: str


def read_problems(path: str) -> list[Problem]:
    """At least one. Raises UserError for a file that does not hold problems."""
    names = ("task_id", "prompt", "test", "entry_point")
    problems = [Problem(*(row[name] for name in names)) for row in _rows("file", path, names)]
    if len({problem.task for problem in problems}) < len(problems):
        raise UserError(f"file={path} has two problems with the same task_id")
    return problems


def read_completions(path: str, problems: list[Problem]) -> dict[str, list[str]]:
    """task_id -> its completions; every problem must have the same number. Raises UserError."""
    found: dict[str, list[str]] = {problem.task: [] for problem in problems}
    for row in _rows("programs.completions", path, ("task_id", "completion")):
        if row["task_id"] not in found:
            raise UserError(f"programs.completions={path}: task_id {row['task_id']} is not a problem of the file")
        found[row["task_id"]].append(row["completion"])
    counts = {len(texts) for texts in found.values()}
    if len(counts) > 1:
        raise UserError(
            f"programs.completions={path} has from {min(counts)} to {max(counts)} completions a problem; all need the same number"
        )
    return found


def truncated(text: str) -> str:
    """A completion up to where it leaves the function."""
    return text[: min((place for stop in STOPS if (place := text.find(stop)) >= 0), default=len(text))]


def _rows(key: str, path: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        with open_regular(path) as file:
            opened = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
            raw = opened.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise UserError(f"{key}={path} has more than {LARGEST // MIB} MiB of text; name a file of problems")
        # At line feeds alone: a JSON string may hold other characters that end lines.
        lines = raw.decode("utf-8-sig").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
        except FormError as error:
            raise UserError(f"{key}={path}: line {number} cannot be read ({error})") from None
        if not isinstance(row, dict) or any(not isinstance(row.get(name), str) for name in names):
            raise UserError(f"{key}={path}: line {number} must have the texts {', '.join(names)}")
        for name in names:
            whole_text(f"{key}={path}: line {number}, {name},", row[name])
        rows.append(row)
    if not rows:
        raise UserError(f"{key}={path} is empty")
    return rows
