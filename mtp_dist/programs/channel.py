"""Calls between a process that runs tests and one that runs a program it must not trust, over two pipes.

The asking side waits, and answers what the other side asks meanwhile (a function that was handed to the program). A reply says
what a call returned or raised, and how the arguments have changed, so that a program may sort its argument in place. Frames are
JSON with their length in front; values are ``values.py``'s.

Functions, iterators and other objects stay where they are: the other side gets a ``Remote`` that asks. Handed back, it is the
object again.
"""

import builtins
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from mtp_dist.programs import values

MOST_BYTES = 32 << 20


class BrokenError(BaseException):
    """The other side has ended, or sent what is no message. Not an Exception: a test that expects one must not pass by it."""


class Remote:
    """An object of the other side."""

    def __init__(self, peer: "Peer", number: int) -> None:
        self._peer, self._number = peer, number


class RemoteFunction(Remote):
    """Something that can be called there."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask("call", self._number, arguments, named)


class RemoteIterable(Remote):
    """Something that can be iterated over there."""

    def __iter__(self) -> Iterator[Any]:
        return self._peer.ask("iter", self._number)


class RemoteIterator(Remote):
    """Something that is being iterated over there: a generator, map, zip."""

    def __iter__(self) -> "RemoteIterator":
        return self

    def __next__(self) -> Any:
        return self._peer.ask("next", self._number)


class RemoteObject(Remote):
    """An instance of a class that this side does not have: attributes and methods, no operators."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._peer.ask("get", self._number, (name,))


KINDS: dict[str, type[Remote]] = {
    "function": RemoteFunction,
    "iterator": RemoteIterator,
    "iterable": RemoteIterable,
    "object": RemoteObject,
}


class Peer:
    """One end. ``namespace``: where names of exception classes are looked up before the builtins. open: whether the other side
    may ask for attributes of objects that it was given."""

    def __init__(self, reading: int, writing: int, namespace: dict[str, Any], classes: values.Classes, *, open: bool) -> None:
        self.reading, self.writing, self.namespace, self.classes, self.open = reading, writing, namespace, classes, open
        self.exported: list[Any] = []
        self.broken = False

    def ask(self, what: str, target: int, arguments: Sequence[Any] = (), named: dict[str, Any] | None = None) -> Any:
        """What it returns there; raises what it raises there, or BrokenError."""
        named = named or {}
        graph, known = values.encode([*arguments, *named.values()], self.classes, self)
        self.send({"what": what, "target": target, "names": list(named), **graph})
        while (message := self.receive()).get("what") != "reply":
            if message.get("what") not in ("call", "iter", "next", "get"):
                self.fail(f"no message: {str(message)[:60]}")
            self.answer(message)
        try:
            found, _ = values.decode(message, self.classes, self, known)
            raised = [str(name) for name in message["raised"]]
        except (values.MalformedError, KeyError, TypeError) as error:
            self.fail(str(error))
        if raised:
            raise self._exception(raised, found)
        if len(found) != 1:
            self.fail("no value")
        return found[0]

    def serve(self) -> None:
        """Answer until the other side ends."""
        while True:
            self.answer(self.receive())

    def answer(self, message: dict) -> None:
        """Do what the other side asks, and say what came of it."""
        raised: list[str] = []
        try:
            found, known = values.decode(message, self.classes, self)
            names = [str(name) for name in message["names"]]
            work = self._work(str(message["what"]), self.exported[self._target(message["target"])])
        except (values.MalformedError, KeyError, TypeError, ValueError, IndexError) as error:
            self.fail(str(error))
        arguments, named = found[: len(found) - len(names)], dict(zip(names, found[len(found) - len(names) :], strict=True))
        before = [self._parts(value) for value in known]
        try:
            results: list[Any] = [work(*arguments, **named)]
        except Exception as error:
            raised, results = [kind.__name__ for kind in type(error).__mro__], list(error.args)
        changed = {place for place, value in enumerate(known) if not _same(before[place], self._parts(value))}
        try:
            graph, _ = values.encode(results, self.classes, self, known, changed)
        except Exception as error:  # objects with properties that fail
            graph, raised = values.encode([str(error)], self.classes, self, known, changed)[0], ["TypeError", "Exception"]
        self.send({"what": "reply", "raised": raised, **graph})

    def export(self, value: object) -> list:
        """``values.Foreign``."""
        if isinstance(value, Remote) and value._peer is self:
            return ["foreign", "yours", value._number]
        self.exported.append(value)
        kind = (
            "function"
            if callable(value)
            else "iterator"
            if hasattr(value, "__next__")
            else "iterable"
            if hasattr(value, "__iter__")
            else "object"
        )
        return ["foreign", kind, len(self.exported) - 1]

    def restore(self, payload: list) -> object:
        """``values.Foreign``."""
        kind, number = payload
        if kind == "yours":
            return self.exported[self._target(number)]
        if type(number) is not int:
            raise TypeError("no number")
        return KINDS[kind](self, number)

    def send(self, message: dict) -> None:
        """Raises BrokenError where nobody reads."""
        raw = json.dumps(message).encode()
        rest = memoryview(struct.pack(">I", len(raw)) + raw)
        try:
            while rest:
                rest = rest[os.write(self.writing, rest) :]
        except OSError as error:
            self.fail(str(error))

    def receive(self) -> dict:
        """The next message. Raises BrokenError."""
        (length,) = struct.unpack(">I", self._read(4))
        if length > MOST_BYTES:
            self.fail(f"a message of {length} bytes")
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            self.fail(str(error))
        if not isinstance(message, dict):
            self.fail("no message")
        return message

    def fail(self, why: str) -> NoReturn:
        """Nothing that follows counts."""
        self.broken = True
        raise BrokenError(why)

    def _read(self, length: int) -> bytes:
        parts, left = [], length
        while left:
            part = os.read(self.reading, min(left, 1 << 20))
            if not part:
                self.fail("the other side has ended")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _work(self, what: str, target: Any) -> Callable[..., Any]:
        if what == "call":
            return target  # type: ignore[no-any-return]
        if what == "get" and self.open:
            return lambda name: getattr(target, name) if not name.startswith("_") else None
        return {"iter": lambda: iter(target), "next": lambda: next(target)}[what]

    def _target(self, number: object) -> int:
        if type(number) is not int or not 0 <= number < len(self.exported):
            raise ValueError(f"no object {number}")
        return number

    def _parts(self, value: Any) -> list[Any]:
        return [bytes(value)] if isinstance(value, bytearray) else values.children(value, self.classes)

    def _exception(self, names: list[str], arguments: list[Any]) -> Exception:
        """The nearest class that this side has too."""
        for name in names:
            found = self.namespace.get(name, getattr(builtins, name, None))
            if isinstance(found, type) and issubclass(found, Exception):
                try:
                    return found.__new__(found, *arguments)
                except Exception:
                    break
        return Exception(*arguments)


def _same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        old is new or (type(old) is type(new) and isinstance(old, str | bytes) and old == new)
        for old, new in zip(before, after, strict=True)
    )
