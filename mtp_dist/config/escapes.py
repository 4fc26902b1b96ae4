"""Escapes in settings whose text is compared with text (``decode.stop``, ``separator``), as typed on the command line.

    separator='\\n\\n'      decode.stop='[\\n\\n, "}, {", \\u3002]'

A backslash begins an escape, in quotes and without; one that is no escape is an error, so that nothing typed is matched against
something else than it seems. Files of settings need none of this: YAML has escapes of its own.
"""

import re

from mtp_dist.errors import UserError

_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.?))", re.DOTALL)
_PART = re.compile(
    r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|((?:[^,"'\\\]]|\\.)(?:[^,\\\]]|\\.)*))\s*(,|\]$)""", re.DOTALL
)


def unescaped(key: str, text: str) -> str:
    r"""The text that ``\n``, ``\t``, ``\r``, ``\\``, ``\'``, ``\"``, ``\uXXXX`` and ``\UXXXXXXXX`` in it stand for. Raises
    UserError for another backslash, naming ``key``."""

    def meaning(match: re.Match[str]) -> str:
        short, long, other = match.groups()
        if digits := short or long:
            number = int(digits, 16)
            if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                raise UserError(f"{key}={text}: {match[0]} is no character; a character beyond \\uFFFF is written \\UXXXXXXXX")
            return chr(number)
        if other not in _SIMPLE:
            known = r"\n, \t, \r, \\, \', \", \uXXXX and \UXXXXXXXX"
            raise UserError(f"{key}={text}: {match[0]} is no escape; there are {known} (write \\\\ for a backslash)")
        return _SIMPLE[other]

    return _ESCAPE.sub(meaning, text)


def unescaped_list(key: str, text: str) -> list[str]:
    r"""``[one, 'two, too', "\n"]`` as texts. Commas, brackets and spaces around a text need quotes. Raises UserError."""
    listed = text.strip()
    found: list[str] = []
    if not listed.startswith("[") or not listed.endswith("]"):
        raise UserError(f"{key}={text}: {key} takes a list of texts, such as {key}='[END, \"}}\"]'")
    place = 1
    if listed[1:-1].strip():
        while place < len(listed):
            match = _PART.match(listed, place)
            if match is None:
                rule = "write texts with commas between them, those with commas, brackets or quotes of their own in quotes"
                raise UserError(f"{key}={text}: the list cannot be read from {listed[place:]!r} on; {rule}")
            quoted = match[1] if match[1] is not None else match[2]
            found.append(unescaped(key, match[3].strip() if quoted is None else quoted))
            place = match.end()
        if listed[place - 1] == ",":
            raise UserError(f"{key}={text}: the list ends with a comma")
    return found
