"""From ``conf/*.yaml`` and ``key=value`` overrides to one typed configuration, and to and from ``resolved.yaml``.

Contract: what comes out is an instance of the schema dataclass, with no key that the schema lacks and no value of another type.
Whatever a user can get wrong here is one UserError of one line. Text settings are taken as they were typed:
``prompt=a, b: ${c}`` needs no quotes beyond the shell's; escapes have a meaning in those of ``escapes.py`` alone.
Composition itself is Hydra's compose API (https://hydra.cc/docs/advanced/compose_api/).
"""

import copy
import io
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtp_dist.config import conf_files
from mtp_dist.config.bounds import require_within
from mtp_dist.config.escapes import unescaped, unescaped_list
from mtp_dist.config.folder import conf_folder, groups
from mtp_dist.config.numbers import NotANumberError, numbers_in, parsed, parts, shown, takes_number
from mtp_dist.config.suggestions import example, key_suggestion, suggestion
from mtp_dist.errors import UserError
from mtp_dist.regular_file import MIB, read_regular

T = TypeVar("T")

_OVERRIDE = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<key>[A-Za-z_][\w./@-]*)(?P<equals>=)?(?P<value>.*)", re.DOTALL)

LARGEST = MIB // 4
"""Of a file of settings, in bytes; they take a few KiB."""
DEEPEST = 20
"""Groups and lists inside of each other, at most; settings have four."""
REMOVED = ("parallel.tail_cost",)
"""Settings of earlier versions that are passed over in their files."""


def compose(config_name: str, schema: type[T], overrides: list[str]) -> T:
    """``conf/<config_name>.yaml`` with ``key=value`` overrides, as an instance of ``schema``. Raises UserError."""
    kinds = settings(schema)
    choices = config_groups(config_name)
    values: dict[str, Any] = {}
    rest: list[str] = []
    options = dict(choices)
    for override in overrides:
        key, text = _checked(override, kinds, choices, schema)
        if key in kinds and _reads(kinds[key]):
            values[key] = _value(key, text, kinds[key], schema)
        else:
            rest.append(override)
            options |= {key: text} if key in choices else {}
    conf_files.check(config_name, options, kinds)
    config = _composed(config_name, schema, rest, kinds)
    for key, item in values.items():
        OmegaConf.update(config, key, item)
    return _typed(config, schema, f"conf/{config_name}.yaml")


def changed(config: T, overrides: list[str], origin: str) -> T:
    """A copy with single settings changed, ``key=value`` as on the command line; groups cannot be chosen. `origin`: where the
    overrides stand, for errors. Raises UserError."""
    schema = type(config)
    kinds, content = settings(schema), _escape_all(asdict(config))  # type: ignore[call-overload]
    for override in overrides:
        key, text = _checked(override, kinds, {}, schema)
        new = _value(key, text, kinds[key], schema)
        *groups, name = key.split(".")
        place = content
        for group in groups:
            place = place[group]
        place[name] = new
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), content)
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {_reason(error, kinds)}") from None
    assert isinstance(merged, DictConfig)
    return _typed(merged, schema, origin)


def save(config: Any, path: str | os.PathLike[str]) -> None:
    """Write a configuration as YAML; a reader sees the old file or the whole new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yaml.safe_dump(asdict(config), file, sort_keys=False, allow_unicode=True, width=1000)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], schema: type[T]) -> T:
    """Read what ``save`` wrote; a setting that the file lacks takes its default, or the ``absent`` of its field. UserError for
    what the schema refuses."""
    try:
        text = read_regular(path, LARGEST).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from None
    try:
        _refuse_large(text)
        raw = OmegaConf.load(io.StringIO(text))
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply") from None
    except Exception as error:  # what YAML makes of hostile text has no common class: dates, numbers, keys
        raise UserError(f"{path} is not valid YAML: {_one_line(error)[:300]}") from None
    if not isinstance(raw, DictConfig):
        raise UserError(f"{path} does not hold settings (a mapping of names to values)")
    content = _escape_all(OmegaConf.to_container(raw, resolve=False))
    _drop_removed(content)
    _refuse_unknown(content, schema, str(path))
    _fill_absent(content, schema)
    _read_numbers(content, settings(schema), str(path))
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), content)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_reason(error, settings(schema))}") from None
    assert isinstance(config, DictConfig)
    return _typed(config, schema, str(path))


def _refuse_large(text: str) -> None:
    """A few lines with references stand for gigabytes, and nesting costs quadratic time; ``save`` writes neither. Raises
    ValueError, and yaml.YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1} refers to an anchor, which settings never do")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"line {event.start_mark.line + 1} is nested too deeply")


def differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Leaf settings whose values differ, in the schema's order: (dotted key, value in ``old``, value in ``new``)."""
    return [(key, value(old, key), value(new, key)) for key in settings(type(new)) if value(old, key) != value(new, key)]


def value(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def chosen(config_name: str, schema: type, overrides: list[str]) -> set[str]:
    """The settings that valid ``overrides`` decide: those typed, and those of every group that was typed.

    A group's option decides whatever any option of that group sets (``parallel=data2`` also says that there is no pipeline); an
    experiment, what its file sets and the groups that it names. All else is left to others.
    """
    kinds, choices = settings(schema), config_groups(config_name)
    found: set[str] = set()
    for override in overrides:
        key, _, option = override.partition("=")
        if key in kinds:
            found.add(key)
        elif key == "experiment":
            found |= _of_experiment(option, kinds)
        elif key in choices:
            found |= _of_group(key, kinds)
    return found


def overlaid(base: T, over: Any, keys: Collection[str]) -> T:
    """A copy of ``base`` with the values that ``over`` has for these dotted keys."""
    mixed = copy.deepcopy(base)
    for key in keys:
        group, _, name = key.rpartition(".")
        setattr(value(mixed, group) if group else mixed, name, copy.deepcopy(value(over, key)))
    return mixed


def settings(schema: type) -> dict[str, Any]:
    """Every leaf setting of a schema: dotted key -> annotated type."""
    return dict(_all_leaves(schema))


def require_numbers(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first number of a configuration, or of the group ``prefix``, that is outside its bounds. Composing
    does so; this is for settings that were made in code."""
    for key, kind in settings(type(config)).items():
        require_within(prefix + key, kind, value(config, key))


def config_groups(config_name: str) -> dict[str, str | None]:
    """The groups that ``conf/<config_name>.yaml`` takes, in its order: group -> the option that it starts with."""
    content = yaml.safe_load((conf_folder() / f"{config_name}.yaml").read_text(encoding="utf-8"))
    found: dict[str, str | None] = {}
    for entry in content["defaults"]:
        if isinstance(entry, dict):
            ((name, option),) = entry.items()
            found[name.removeprefix("optional ")] = option
    return found


def type_name(kind: Any) -> str:
    """A type as users read it: ``int``, ``text``, ``int or null``, ``list of int``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"{type_name(arguments[1])} by name"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if item is type(None) else type_name(item) for item in arguments)
    return {str: "text", int: "int", float: "number", bool: "true or false"}.get(kind, str(kind))


@cache
def _escaping(schema: type, prefix: str = "") -> frozenset[str]:
    """Settings in whose text escapes have a meaning."""
    found: set[str] = set()
    for item in fields(schema):
        if is_dataclass(item.type):
            found |= _escaping(typing.cast(type, item.type), f"{prefix}{item.name}.")
        elif item.metadata.get("escapes"):
            found.add(f"{prefix}{item.name}")
    return frozenset(found)


def _of_group(group: str, kinds: Mapping[str, Any]) -> set[str]:
    files = sorted((conf_folder() / group).glob("*.yaml"))
    return {key for file in files for key in _keys(_yaml(file), f"{group}.", kinds)}


def _of_experiment(option: str, kinds: Mapping[str, Any]) -> set[str]:
    if option == "null":
        return set()
    content = _yaml(conf_folder() / "experiment" / f"{option}.yaml")
    named = [str(group).removeprefix("override /") for entry in content.pop("defaults", []) for group in entry]
    return set(_keys(content, "", kinds)).union(*(_of_group(group, kinds) for group in named))


def _yaml(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _keys(content: Mapping[str, Any], prefix: str, kinds: Mapping[str, Any]) -> Iterator[str]:
    for name, item in content.items():
        if f"{prefix}{name}" in kinds:
            yield f"{prefix}{name}"
        elif isinstance(item, dict):
            yield from _keys(item, f"{prefix}{name}.", kinds)


@cache
def _all_leaves(schema: type) -> tuple[tuple[str, Any], ...]:
    return tuple(_leaves(schema, ""))


def _leaves(schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _checked(override: str, kinds: dict[str, Any], choices: dict[str, str | None], schema: type) -> tuple[str, str]:
    """Key and value of an override whose key exists; UserError for one that adds, deletes or does not exist, or is no text."""
    _require_text(override)
    match = _OVERRIDE.fullmatch(override)
    if match is None or not match["equals"]:
        place = next((name for name in ("checkpoint", "run_dir") if name in kinds), "") if os.path.exists(override) else ""
        meant = f"; did you mean {place}={override}?" if place else " (see --help)"
        raise UserError(f"{override!r} is not an override; write key=value{meant}")
    key, prefix = match["key"], match["prefix"]
    branches = {".".join(name.split(".")[:depth]) for name in kinds for depth in range(1, name.count(".") + 1)}
    if key not in kinds and key not in branches and key not in choices:
        raise UserError(f"{key} is not a setting of {schema.__name__}{key_suggestion(key, list(kinds), list(choices))}")
    if prefix == "~":
        raise UserError(f"{override}: a setting cannot be removed; give it a value: {key}=VALUE")
    if prefix:
        raise UserError(f"{override}: settings are fixed, none can be added; write {key}={match['value']}")
    if key in choices and key not in kinds:
        _refuse_option(key, match["value"], key in branches)
    elif key in branches:
        raise UserError(f"{override}: {key} is a group of settings; set one of them: {key}.{_first_field(key, kinds)}=VALUE")
    return key, match["value"]


def _require_text(override: str) -> None:
    """Raise UserError for bytes that are not UTF-8: no file of settings could hold them, and no tokenizer read them."""
    try:
        override.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(override).decode(errors="backslashreplace")
        raise UserError(f"{shown} is not UTF-8 (character {error.start}, counted from 0); give it as UTF-8") from None


def _refuse_option(group: str, option: str, has_settings: bool) -> None:
    options = groups().get(group, [])
    if option in options or (group == "experiment" and option == "null"):
        return
    also = f"; single settings are {group}.NAME=VALUE" if has_settings else ""
    raise UserError(f"{group}={option}: conf/{group}/ has {', '.join(options)}{suggestion(option, options) or also}")


def _first_field(key: str, kinds: dict[str, Any]) -> str:
    return next(name.removeprefix(f"{key}.") for name in kinds if name.startswith(f"{key}."))


def _takes_text(kind: Any, value: str) -> bool:
    return kind is str or (str in typing.get_args(kind) and type(None) in typing.get_args(kind) and value != "null")


def _unescaped(key: str, kind: Any, value: str) -> str | list[str]:
    return unescaped_list(key, value) if kind == list[str] else unescaped(key, _unquoted(value))


def _reads(kind: Any) -> bool:
    """Whether ``_value`` takes the text of a setting of that type, so that Hydra never sees it."""
    return kind == list[str] or str in (kind, *typing.get_args(kind)) or takes_number(kind)


def _value(key: str, text: str, kind: Any, schema: type) -> Any:
    """What was typed for a setting, for OmegaConf to take as it is. Raises UserError that shows what would be right."""
    if key in _escaping(schema):
        return _escape_all(_unescaped(key, kind, text))
    if _takes_text(kind, text):
        return _escaped(_unquoted(text))
    if str in typing.get_args(kind) and typing.get_origin(kind) is not list:
        return None  # null
    if takes_number(kind) and "${" in text:
        raise UserError(f"{key}={text}: {key} takes {type_name(kind)}, and no interpolation; write the value")
    try:
        item = parsed(_unquoted(text), kind) if takes_number(kind) else _texts(text)
    except NotANumberError:
        shape = f"{key}={example(key, kind, value(schema(), key))}"
        raise UserError(f"{key}={shown(text)}: {key} takes {type_name(kind)}, such as {shape}") from None
    require_within(key, kind, item, typed=text)
    return item


def _texts(text: str) -> list[str]:
    """A list of texts, ``[a, 'b, c']``, each as it was typed: quotes are for a comma, nothing is looked up or converted. Raises
    NotANumberError for anything else."""
    return [_escaped(_unquoted(part.strip())) for part in parts(text.strip(), quotes="'\"")]


def _unquoted(value: str) -> str:
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def _read_numbers(content: dict[str, Any], kinds: dict[str, Any], origin: str) -> None:
    """Convert the numbers of a file in place: text by the one rule (`2B`), and whole numbers in lists of lists of numbers, which
    OmegaConf refuses. UserError for a number where true or false belongs."""
    for key, kind in kinds.items():
        *groups, name = key.split(".")
        place: Any = content
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            continue
        item = place[name]
        conf_files.require_flag(key, kind, item, origin)
        if kind == list[list[float]]:
            if type(item) is not list or not all(type(row) is list for row in item):
                raise UserError(f"{origin}: {key}={shown(item)} is not a list of lists, such as [[1000, 0.1]]")
            place[name] = [[float(n) if type(n) is int and abs(n) < 10**300 else n for n in row] for row in item]
        elif takes_number(kind) and isinstance(item, str):
            try:
                place[name] = parsed(item, kind)
            except NotANumberError:
                raise UserError(f"{origin}: {key}={shown(item)}: {key} takes {type_name(kind)}") from None


def _escaped(text: str) -> str:
    """The text such that OmegaConf reads it literally: ``${`` would be an interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _escape_all(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _escape_all(item) for key, item in content.items()}
    if isinstance(content, list):
        return [_escape_all(item) for item in content]
    return _escaped(content) if isinstance(content, str) else content


def _composed(config_name: str, schema: type, overrides: list[str], kinds: dict[str, Any]) -> DictConfig:
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    # A caller's own Hydra application, or a composition cut short, would make initialize_config_dir refuse.
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_folder()), job_name="mtp_dist", version_base="1.3"):
            return hydra_compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_culprit(error, overrides, kinds) or f"conf/{config_name}.yaml: {_reason(error, kinds)}") from None


def _culprit(error: BaseException, overrides: list[str], kinds: dict[str, Any]) -> str | None:
    """The message for the one override that the error speaks of, or None."""
    for override in overrides:
        if override in str(error) or not _parses(override):
            key = override.partition("=")[0]
            if key in kinds:
                return f"{override}: {key} takes {type_name(kinds[key])}"
            return f"{override}: {_one_line(error)}"
    return None


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _typed(config: DictConfig, schema: type[T], origin: str) -> T:
    """The dataclass instance. Hydra opens a structured config to ``+key=value``, so unknown keys are looked for once more."""
    content = OmegaConf.to_container(config, resolve=False)
    _refuse_unknown(content, schema, origin)
    _require_numbers(content, schema, origin)
    try:
        instance = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {_reason(error, settings(schema))}") from None
    assert isinstance(instance, schema)
    return instance


def _require_numbers(content: Any, schema: type, origin: str) -> None:
    """Raise UserError for a number outside its bounds, or one that is to be looked up elsewhere: an error would show what is
    there."""
    for key, kind in settings(schema).items():
        item = content
        for name in key.split("."):
            item = item.get(name) if isinstance(item, dict) else None
        if not takes_number(kind):
            continue
        for number in numbers_in(item):
            if isinstance(number, str):
                raise UserError(f"{origin}: {key}={number}: {key} takes {type_name(kind)}, and no interpolation; write the value")
        try:
            require_within(key, kind, item)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None


def _drop_removed(content: Any) -> None:
    """Leave out, in place, what earlier versions wrote and no version needs any more: settings that change no result."""
    for key in REMOVED:
        group, name = key.split(".")
        if isinstance(content, dict) and isinstance(content.get(group), dict):
            content[group].pop(name, None)


def _fill_absent(content: dict[Any, Any], schema: type) -> None:
    """Add, in place, what the groups of a file saved by an earlier version mean where the default has another meaning."""
    hints = typing.get_type_hints(schema)
    for item in fields(schema):
        if "absent" in item.metadata:
            content.setdefault(item.name, item.metadata["absent"])
        elif is_dataclass(hints[item.name]) and isinstance(content.get(item.name), dict):
            _fill_absent(content[item.name], typing.cast(type, hints[item.name]))


def _refuse_unknown(content: Any, schema: type, origin: str, prefix: str = "") -> None:
    if not isinstance(content, dict):
        raise UserError(f"{origin}: {prefix.rstrip('.')} must be a group of settings, not {content!r}")
    hints = typing.get_type_hints(schema)
    for name, item in content.items():
        key = f"{prefix}{name}"
        if name not in hints:
            near = suggestion(str(name), list(hints))
            raise UserError(f"{origin}: {key} is not a setting{near}")
        if is_dataclass(hints[name]):
            _refuse_unknown(item, typing.cast(type, hints[name]), origin, f"{key}.")


def _reason(error: BaseException, kinds: dict[str, Any]) -> str:
    """What is wrong, in one line: the setting and the type it takes where the error knows the setting."""
    cause: BaseException | None = error
    while cause is not None:
        key = getattr(cause, "full_key", None)
        if key and (root := re.sub(r"\[.*", "", key)) in kinds:
            return f"{key} takes {type_name(kinds[root])} ({_one_line(cause)})"
        if key:
            return f"{key}: {_one_line(cause)}"
        cause = cause.__cause__
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Hydra names the file in its first line and what is wrong in the second; OmegaConf's own lines end with its internals.
    telling = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return " ".join(telling[:2]) or type(error).__name__
