"""JSON documents with typed fields: one strict reader for everything that a program wrote and a program reads.

    @dataclass
    class Record:
        size: int
        names: list[str]

    record = typed(parsed(content), Record)

Whatever is not as its type says is a `FormError` whose one line names the field: ``files.rank_0.size: 'x' is not an integer``.
Callers put file and way out before and after it. JSON itself allows more than any document here needs; refused are keys given
twice, NaN and infinity, halves of surrogate pairs, nesting beyond Python's own limit, and integers beyond 64 bits.
"""

import json
import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
LARGEST = 2**63 - 1
"""Of the integers of a document, in both directions."""


class FormError(ValueError):
    """A document is not JSON, or a field of it is not what it must be."""


def parsed(content: bytes | str, *, nonfinite: bool = False) -> Any:
    """The value of a JSON text. ``nonfinite``: NaN and Infinity are numbers, as Python writes them. Raises FormError."""
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=float if nonfinite else _refuse,
            parse_int=_integer,
            parse_float=_number,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except FormError:
        raise
    except UnicodeDecodeError as error:
        raise FormError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise FormError("it holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise FormError(f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise FormError("it is nested too deeply") from None
    except ValueError as error:  # whatever else the decoder finds
        raise FormError(f"not JSON: {str(error)[:80]}") from None
    return value


def typed(value: Any, kind: type[T], place: str = "") -> T:
    """``value`` as ``kind``: int, float, str, bool, None, Any, list, dict with str keys, unions, and dataclasses of these.

    A dataclass takes its own fields and no others; those with a default may be absent. It may check itself in
    ``__post_init__``, by ValueError. ``place``: of the value in its document, for errors. Raises FormError.
    """
    return typing.cast(T, _typed(value, kind, place))


def _typed(value: Any, kind: Any, place: str) -> Any:
    if kind is Any:
        return value
    if kind is int:
        if type(value) is int:
            return value
        _wrong(place, value, "an integer")
    if kind is str:
        if type(value) is str:
            return value
        _wrong(place, value, "a string")
    if kind is bool:
        if type(value) is bool:
            return value
        _wrong(place, value, "true or false")
    if kind is float:
        if type(value) in (int, float):
            return value
        _wrong(place, value, "a number")
    if kind is type(None):
        if value is None:
            return None
        _wrong(place, value, "null")
    if is_dataclass(kind):
        return _record(value, kind, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        if type(value) is not list:
            _wrong(place, value, "a list")
        return [_typed(item, arguments[0], f"{place}[{number}]") for number, item in enumerate(value)]
    if origin is dict:
        if type(value) is not dict:
            _wrong(place, value, "an object")
        return {key: _typed(item, arguments[1], _below(place, key)) for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, place)
    raise TypeError(f"{kind} is no type of a document")


def _record(value: Any, kind: Any, place: str) -> Any:
    if type(value) is not dict:
        _wrong(place, value, "an object")
    hints, needed = _fields(kind)
    if not needed <= value.keys():
        raise FormError(f"{_below(place, min(needed - value.keys()))} is missing")
    if not value.keys() <= hints.keys():
        raise FormError(f"{_below(place, min(value.keys() - hints.keys()))} is not a field")
    found = {name: _typed(item, hints[name], _below(place, name)) for name, item in value.items()}
    try:
        return kind(**found)
    except ValueError as error:
        raise FormError(f"{place}: {error}" if place else str(error)) from None


def _one_of(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    problem = ""
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _typed(value, kind, place)
        except FormError as error:
            problem = str(error)
    raise FormError(problem)


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types of a dataclass's fields, and the names of those without a default."""
    hints = typing.get_type_hints(kind)
    needed = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
    return {item.name: hints[item.name] for item in fields(kind)}, frozenset(needed)


def _below(place: str, key: str) -> str:
    short = key if len(key) <= 60 and key.isprintable() else repr(key)[:60]
    return f"{place}.{short}" if place else short


def _wrong(place: str, value: Any, wanted: str) -> NoReturn:
    shown = "an object" if type(value) is dict else "a list" if type(value) is list else json.dumps(value)
    short = shown if len(shown) <= 40 else f"{shown[:40]}..."
    raise FormError(f"{place or 'the document'} is {short}, not {wanted}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FormError(f"the key {twice[:40]!r} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise FormError(f"the number {text[:20]}{'...' if len(text) > 20 else ''} has more than 64 bits")
    return int(text)


def _number(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise FormError(f"the number {text[:20]} is too large")
    return found


def _refuse(text: str) -> NoReturn:
    raise FormError(f"{text} is not a number of JSON")
