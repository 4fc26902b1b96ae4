"""What an input covers and is not read: nothing is left out silently."""

import os

SHOWN = 3  # examples a reason


def printable(path: str | os.PathLike[str]) -> str:
    """A path that any output can show in one line: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class Unread:
    """How many places are not read, by reason, and the first few of each."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def add(self, reason: str, place: str | os.PathLike[str]) -> None:
        """`reason` completes "not read: 3 ...", in the plural."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._first[reason] = sorted([*self._first.get(reason, []), printable(place)])[:SHOWN]

    def lines(self) -> list[str]:
        """One a reason: how many, and the first few by name."""
        found = []
        for reason, count in self._counts.items():
            first = self._first[reason]
            more = f" and {count - len(first)} more" if count > len(first) else ""
            found.append(f"not read: {count} {reason}: {', '.join(first)}{more}")
        return found
