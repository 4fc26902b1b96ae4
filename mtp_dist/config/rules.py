"""Checks of single values, worded alike everywhere: the setting, its value, what is allowed."""

import math
from collections.abc import Iterable, Sequence

from mtp_dist.config.suggestions import suggestion
from mtp_dist.errors import UserError


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raise UserError unless the value is one of the allowed words."""
    if value not in allowed:
        raise UserError(f"{key}={value} is not one of {alternatives(allowed)}{suggestion(value, list(allowed))}")


def at_least(key: str, value: float | None, least: float) -> None:
    """Raise UserError for a number below ``least``; None (not set) passes."""
    if value is not None and not value >= least:
        raise UserError(f"{key}={value} must be at least {least}")


def above(key: str, value: float | None, bound: float) -> None:
    """Raise UserError for a number that is not greater than ``bound``; None (not set) passes."""
    if value is not None and not value > bound:
        raise UserError(f"{key}={value} must be greater than {bound}")


def between(key: str, value: float, least: float, most: float) -> None:
    """Raise UserError for a number outside [least, most]."""
    if not least <= value <= most:
        raise UserError(f"{key}={value} must be from {least} to {most}")


def given(key: str, value: str, example: str) -> None:
    """Raise UserError for an empty text that has no sensible default."""
    if not value:
        raise UserError(f"{key} is empty; give it: {key}={example}")


def whole_text(key: str, text: str) -> None:
    """Raise UserError for a text that UTF-8 cannot hold: half a character, as JSON may spell one, or a byte that was no UTF-8
    where the text came from (Python keeps such a byte as one of U+DC80 to U+DCFF)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        place = f"at place {error.start}, counted from 0"
        if 0xDC80 <= code <= 0xDCFF:
            raise UserError(f"{key} is not UTF-8: byte 0x{code - 0xDC00:02x} {place}; give it as UTF-8") from None
        raise UserError(f"{key} has half a character (\\u{code:04x}) {place}; give whole ones") from None


def alternatives(values: Iterable[object]) -> str:
    """``1, 2 or 4``."""
    words = [str(item) for item in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    low = [item for item in range(1, math.isqrt(number) + 1) if number % item == 0]
    return sorted({*low, *(number // item for item in low)})
