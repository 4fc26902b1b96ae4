"""One rule for every number that a user gives: on the command line, in a settings file, or in the JSON of a request.

    train.tokens=2B   train.sequence_length=1k   train.sequence_length=4Ki   optim.lr=3e-4   mtp.curriculum=[[0,1],[1B,2]]

A number is decimal digits, underscores between them, and an exponent or a suffix: K, M, B (or G) and T are powers of 1000, Ki,
Mi, Gi and Ti powers of 1024; upper or lower case. So 1k is 1000 and 1Ki is 1024. It is finite and within the ``Bounds`` of its
setting (``bounds.py``). Text is parsed here and not by YAML or Hydra: nothing is looked up, rounded or expanded on the way.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from types import NoneType
from typing import Any, get_args, get_origin

SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
LONGEST_TEXT = 60
"""Characters of a number: more digits than any setting can use."""
_NUMBER = re.compile(r"([+-]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?)([kmbgt]i?)?", re.IGNORECASE)
_DIGITS = re.compile(r"[+-]?[\d_]*\.?[\d_]+")
_NOT_FINITE = re.compile(r"[+-]?\.?(nan|inf|infinity)", re.IGNORECASE)
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Bounds:
    """From ``least`` to ``most``, or also 0 where ``zero``. ``below``: ``most`` itself is not allowed. ``example``: what an error
    shows where the setting has no default."""

    least: float
    most: float
    zero: bool = False
    below: bool = False
    example: float | None = None

    def hold(self, number: float) -> bool:
        """Whether a finite number is within."""
        if self.zero and number == 0:
            return True
        return self.least <= number and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        span = f"{plain(self.least)} to {'less than ' if self.below else ''}{plain(self.most)}"
        return f"0, or {span}" if self.zero else span


class NotANumberError(ValueError):
    """A text that is no value of its setting's type."""


def fault(number: object, bounds: Bounds, *, whole: bool) -> str | None:
    """What a number must be, where it is not: "must be a whole number from 1 to 100". None where it is."""
    if not isinstance(number, bool) and isinstance(number, int if whole else int | float):
        # An int may be too large for a float, so it is compared as it is.
        finite = isinstance(number, int) or math.isfinite(number)
        if finite and bounds.hold(number):
            return None
    kind = "a whole number" if whole else "a number"
    return f"must be 0, or {kind} from {str(bounds).removeprefix('0, or ')}" if bounds.zero else f"must be {kind} from {bounds}"


def parsed(text: str, kind: Any) -> Any:
    """The value of a number, a truth value, one of them or null, or a list of any, as typed. Raises NotANumberError.

    A non-finite number is returned as such: the bounds refuse it, and name themselves.
    """
    text = text.strip()
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list:
        return [parsed(part, arguments[0]) for part in parts(text)]
    if NoneType in arguments:
        if text.lower() in ("null", "~"):
            return None
        (kind,) = (item for item in arguments if item is not NoneType)
    if kind is bool:
        if text.lower() not in _WORDS:
            raise NotANumberError(text)
        return _WORDS[text.lower()]
    return _whole(text) if kind is int else _real(text)


def parts(text: str, quotes: str = "") -> list[str]:
    """The elements of ``[a, b]`` or ``[[a, b], [c]]``, as typed; a comma between two of ``quotes`` or within brackets separates
    nothing. Raises NotANumberError where brackets or quotes do not fit."""
    if len(text) < 2 or text[0] != "[" or text[-1] != "]":
        raise NotANumberError(text)
    inner = text[1:-1]
    if not inner.strip():
        return []
    found, depth, start, quote = [], 0, 0, ""
    for place, letter in enumerate(inner):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in quotes and not inner[start:place].strip():
            quote = letter
        else:
            depth += (letter == "[") - (letter == "]")
            if depth < 0:
                raise NotANumberError(text)
            if letter == "," and depth == 0:
                found.append(inner[start:place])
                start = place + 1
    if depth or quote:
        raise NotANumberError(text)
    return [*found, inner[start:]]


def takes_number(kind: Any) -> bool:
    """Whether a setting's type holds numbers or truth values, so that ``parsed`` reads it."""
    return kind in (bool, int, float) or any(takes_number(item) for item in get_args(kind))


def numbers_in(value: Any) -> list[Any]:
    """The single values of a setting, out of whatever lists it has."""
    return [number for item in value for number in numbers_in(item)] if isinstance(value, list | tuple) else [value]


def shown(value: object) -> str:
    """A number as one would type it, cut where it is too long to read."""
    try:
        text = str(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of more than 4300 digits"
    return text if len(text) <= LONGEST_TEXT else f"{text[:12]}...({len(text)} characters)"


def json_whole(text: str) -> int:
    """For ``json.loads(parse_int=...)``: ValueError in our words for a number that Python would not read."""
    if len(text) > 400:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def plain(number: float) -> str:
    """A number as a person writes it: 1000000, 1e18, 1e-8, 0.001."""
    if isinstance(number, int) and (abs(number) < 10**10 or int(float(f"{number:g}")) != number):
        return str(number)
    return re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), f"{number:g}")


def _whole(text: str) -> Any:
    number = _exact(text)
    if isinstance(number, float):
        return number
    if number.denominator != 1:
        raise NotANumberError(text)
    return int(number)


def _real(text: str) -> float:
    number = _exact(text)
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _exact(text: str) -> Fraction | float:
    """The number exactly, or nan or an infinity. Raises NotANumberError."""
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if len(text) > LONGEST_TEXT and _DIGITS.fullmatch(text):
        return math.inf
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST_TEXT else None
    if match is None:
        raise NotANumberError(text)
    return Fraction(match[1].replace("_", "")) * SUFFIXES.get((match[2] or "").lower(), 1)
