"""The files of ``conf/`` that a command composes, checked before Hydra reads them.

People add files of their own there (an experiment, a model). YAML's aliases let ten lines stand for 10^9 values, and OmegaConf
takes any whole number for true; both are refused here, in one line that names file and place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from mtp_dist.config.folder import conf_folder
from mtp_dist.errors import UserError

MOST_BYTES = 2**20
DEEPEST = 50
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check(config_name: str, options: dict[str, str | None], kinds: dict[str, Any]) -> None:
    """Raise UserError for the first file that cannot be composed. ``options``: group -> option, as chosen. ``kinds``: settings of
    the schema."""
    seen: set[Path] = set()
    waiting = [("", conf_folder() / f"{config_name}.yaml")]
    waiting += [(group, conf_folder() / group / f"{option}.yaml") for group, option in options.items() if option]
    while waiting:
        group, path = waiting.pop()
        if path in seen or not path.is_file():
            continue  # Hydra says which option is missing
        seen.add(path)
        text = _text(path)
        content = _plain(text, path)
        _refuse_wrong_flags(content, "" if not group or "@package _global_" in text else f"{group}.", kinds, path)
        waiting += _defaults(content, group)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES} bytes, which is no file of settings")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}") from None


def _plain(text: str, path: Path) -> dict[str, Any]:
    """The content of a file without aliases, which is therefore no larger than its text."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path} line {event.start_mark.line + 1}: *{event.anchor} is a YAML alias; write the value out")
            if depth > DEEPEST:
                raise UserError(f"{path} line {event.start_mark.line + 1} is nested deeper than {DEEPEST}; settings are not")
        content = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # a number or a date that Python does not read
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold settings (a mapping of names to values)")
    return content


def _refuse_wrong_flags(content: dict[str, Any], prefix: str, kinds: dict[str, Any], path: Path) -> None:
    for name, item in content.items():
        key = f"{prefix}{name}"
        if isinstance(item, dict):
            _refuse_wrong_flags(item, f"{key}.", kinds, path)
        else:
            require_flag(key, kinds.get(key), item, str(path))


def require_flag(key: str, kind: Any, item: object, origin: str) -> None:
    """Raise UserError for a number where true or false belongs."""
    if kind is bool and isinstance(item, int | float) and not isinstance(item, bool):
        raise UserError(f"{origin}: {key}={item}: {key} takes true or false")


def _defaults(content: dict[str, Any], group: str) -> Iterator[tuple[str, Path]]:
    """The files that a file's defaults list names."""
    entries = content.get("defaults")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, str) and group:
            yield group, conf_folder() / group / f"{entry}.yaml"
        elif isinstance(entry, dict):
            for name, option in entry.items():
                other = str(name).split()[-1].lstrip("/")
                if isinstance(option, str):
                    yield other, conf_folder() / other / f"{option}.yaml"
