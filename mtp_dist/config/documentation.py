"""Writes docs/configuration.md from the schemas: ``python -m mtp_dist.config.documentation``.

With ``--check`` it writes nothing and exits with 1 when the page is not current.
"""

import argparse
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from mtp_dist.config import schema
from mtp_dist.config.bounds import bounds_of
from mtp_dist.config.command import shown
from mtp_dist.config.compose import config_groups, type_name
from mtp_dist.config.folder import conf_folder, groups

ROOTS: dict[str, type] = {
    "train": schema.TrainingRun,
    "plan": schema.Plan,
    "evaluate": schema.Evaluation,
    "generate": schema.Generation,
    "serve": schema.Serving,
    "export": schema.Export,
    "inspect": schema.Inspection,
    "build_shards": schema.ShardBuild,
    "report": schema.Report,
    "study": schema.Study,
}

INTRODUCTION = """# Configuration

Generated from `mtp_dist/config/schema.py` and `conf/` by `python -m mtp_dist.config.documentation`; do not edit.

Every command takes `key=value` settings and `group=option` choices. `--help` lists them, `--cfg` prints the composed result.
A setting's value comes from, later over earlier: the default below, the options chosen in `conf/<command>.yaml`,
`experiment=NAME`, the command line. A list is written `key=[1,2]`, no value is `key=null`, and text is taken as typed: a `\\n` in
`prompt` is a backslash and an n. In `decode.stop` and `separator` escapes have their meaning: `\\n`, `\\t`,
`\\r`, `\\\\`, `\\'`, `\\"`, `\\uXXXX` and `\\UXXXXXXXX`; another backslash there is an error.
Unknown keys and wrong types are errors, and a setting cannot be added with `+`.

A number is written as `2000000000`, `2_000_000_000`, `2e9` or `2B`. The suffixes K, M, B (or G) and T are decimal, Ki, Mi, Gi and
Ti binary, in upper or lower case: `train.sequence_length=1k` is 1000 positions, `train.sequence_length=1Ki` is 1024. Each number
has bounds (below, beside its type); `nan`, `inf` and interpolations (`${...}`) are refused. True or false may also be yes or no,
on or off, but no number. Text is taken as it was typed, also in a list: `launch.setup=[module load cuda, export X=${HOME}]`.
"""


def markdown() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Commands\n"]
    parts += [_command(name, cls) for name, cls in ROOTS.items()]
    parts.append("## Groups\n\nA group's options are the files of `conf/GROUP/`; each states what differs from the defaults.\n")
    parts += [_group(name, options) for name, options in groups().items()]
    parts.append("## Settings\n")
    parts += [_table(name, cls) for name, cls in _nested_classes().items()]
    return "\n".join(parts)


def main() -> int:
    """Write the page, or compare it; 1 when it is stale."""
    parser = argparse.ArgumentParser(description="Writes docs/configuration.md from the schemas.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is not current")
    arguments = parser.parse_args()
    path = conf_folder().parent / "docs" / "configuration.md"
    if not arguments.check:
        path.parent.mkdir(exist_ok=True)
        path.write_text(markdown(), encoding="utf-8")
        return 0
    if is_current(path):
        return 0
    print(f"{path} is not current; run python -m mtp_dist.config.documentation", file=sys.stderr)
    return 1


def is_current(path: Path) -> bool:
    """Whether the file says what the schemas say."""
    return path.is_file() and path.read_text(encoding="utf-8") == markdown()


def _command(name: str, cls: type) -> str:
    chosen = config_groups(name)
    listed = ", ".join(f"`{group}={option}`" for group, option in chosen.items() if option)
    start = f"Starts from {listed}." if listed else "Takes no groups."
    own = {field: row for field, row in schema.describe(cls).items() if not is_dataclass(row[0])}
    nested = [field for field, row in schema.describe(cls).items() if is_dataclass(row[0])]
    more = f"\nAnd the settings of {', '.join(f'[`{field}`](#{field}-settings)' for field in nested)}.\n" if nested else ""
    return f"### {' '.join((cls.__doc__ or '').split())}\n\n`conf/{name}.yaml`. {start}\n\n{_rows(own, '')}{more}"


def _group(name: str, options: list[str]) -> str:
    rows = []
    for option in options:
        text = (conf_folder() / name / f"{option}.yaml").read_text(encoding="utf-8")
        comments = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
        about = " ".join(line for line in comments if not line.startswith("@package"))
        content = {key: item for key, item in (yaml.safe_load(text) or {}).items() if key != "defaults"}
        rows.append(f"| `{name}={option}` | {_cell(about)} | {', '.join(_assignments(content, ''))} |")
    return f"### `{name}=`\n\n| option | what it is | sets |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _assignments(content: dict[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key, item in content.items():
        if isinstance(item, dict):
            found += _assignments(item, f"{prefix}{key}.")
        else:
            found.append(f"`{prefix}{key}={shown(item).replace(' ', '')}`")
    return found


def _nested_classes() -> dict[str, type]:
    """Group name -> class, each once, in the order of the commands."""
    found: dict[str, type] = {}
    for cls in ROOTS.values():
        for name, (kind, _, _) in schema.describe(cls).items():
            if is_dataclass(kind):
                found.setdefault(name, kind)  # type: ignore[arg-type]
    return found


def _table(name: str, cls: type) -> str:
    summary = "\n\n".join(" ".join(part.split()) for part in (cls.__doc__ or "").split("\n\n"))
    return f"### {name} settings\n\n{summary}\n\n{_rows(schema.describe(cls), f'{name}.')}"


def _rows(rows: dict[str, tuple[Any, Any, str]], prefix: str) -> str:
    lines = [
        f"| `{prefix}{name}` | {type_name(kind)}{_span(prefix + name, kind)} | "
        f"{f'`{shown(default)}`' if default != '' else ''} | {_cell(text)} |"
        for name, (kind, default, text) in rows.items()
    ]
    return "| setting | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"


def _span(key: str, kind: Any) -> str:
    bounds = bounds_of(key, kind)
    return f", {bounds}" if bounds is not None else ""


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
