"""Plain Python values as JSON, between a process that runs tests and one that runs a program it must not trust.

A value is a graph: a flat list of nodes ``[tag, payload]`` that name each other by number, so that depth costs no recursion, and
lists that share or contain each other arrive that way. Decoding builds values of the types below and nothing else; it never
imports, calls or evaluates what it reads. Subclasses arrive as the plain type, so an ``__eq__`` of the program's own stays
behind.

What is no plain value (functions, iterators, other objects) is left to ``Foreign``, which ``channel.py`` implements.
"""

import builtins
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Container, Sequence
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any, Protocol

MOST_NODES = 2_000_000
FACTORIES: dict[str | None, type | None] = {
    None: None,
    **{kind.__name__: kind for kind in (bool, int, float, str, tuple, list, dict, set)},
}
TYPES = {name: found for name, found in vars(builtins).items() if isinstance(found, type)}
SEQUENCES: dict[str, type] = {"list": list, "set": set, "deque": deque}
MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


class MalformedError(Exception):
    """What was read is not a graph of values."""


class Foreign(Protocol):
    """Stands in for what is no plain value."""

    def export(self, value: object) -> list:
        """Its node."""

    def restore(self, payload: list) -> object:
        """What stands for it. May raise anything for a payload that ``export`` would not make."""


Classes = dict[str, type]
"""Classes that both sides have from the problem itself; their instances travel as their attributes."""


def encode(
    roots: Sequence[object], classes: Classes, foreign: Foreign, known: Sequence[object] = (), changed: Container[int] = ()
) -> tuple[dict, list[object]]:
    """(the graph, its mutable values in their order). known: mutable values that the other side has; they come first in its
    table, and only those at the places ``changed`` are sent anew."""
    index: dict[int, int] = {}
    order: list[object] = []
    later: list[object] = []

    def place(value: object) -> None:
        index[id(value)] = len(order)
        order.append(value)
        if len(order) > MOST_NODES:
            raise ValueError(f"a value has more than {MOST_NODES} parts")

    def walk(start: object) -> None:
        stack = [(start, False)]
        while stack:
            value, inner = stack.pop()
            if id(value) in index:
                continue
            if inner or not is_container(value, classes) or is_mutable(value, classes):
                place(value)
                if is_mutable(value, classes):
                    later.append(value)
            else:
                # Immutable: built at once, so after what it holds.
                stack.append((value, True))
                stack.extend((child, False) for child in reversed(children(value, classes)))

    for place_, value in enumerate(known):
        place(value)
        if place_ in changed:
            later.append(value)
    for root in roots:
        walk(root)
    while later:
        for child in children(later.pop(), classes):
            walk(child)
    nodes: list[list | None] = [None] * len(order)
    for number, value in enumerate(order):
        if number >= len(known) or number in changed:
            nodes[number] = _node(value, index, classes, foreign)
    graph = {"nodes": nodes, "roots": [index[id(root)] for root in roots]}
    return graph, [value for value in order if is_mutable(value, classes)]


def decode(graph: dict, classes: Classes, foreign: Foreign, known: Sequence[object] = ()) -> tuple[list[Any], list[Any]]:
    """(roots, mutable values in their order). ``known`` ones are changed in place. Raises MalformedError for what is no graph."""
    try:
        return _decode(graph, classes, foreign, known)
    except MemoryError:
        raise
    except Exception as error:
        raise MalformedError(f"{type(error).__name__}: {error}") from None


def is_mutable(value: object, classes: Classes) -> bool:
    return isinstance(value, list | dict | set | bytearray | deque) or _is_instance(value, classes)


def is_container(value: object, classes: Classes) -> bool:
    return isinstance(value, tuple | frozenset) or is_mutable(value, classes)


def children(value: object, classes: Classes) -> list[Any]:
    """What a container holds, in a flat list: keys and values of a mapping in turn, of an instance's attributes likewise."""
    if _is_instance(value, classes):
        return [part for pair in _attributes(value).items() for part in pair]
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    return [] if isinstance(value, bytearray) else list(value)  # type: ignore[call-overload]


def _is_instance(value: object, classes: Classes) -> bool:
    kind = type(value)
    plain = (int, float, complex, str, bytes, bytearray, tuple, frozenset, list, dict, set, deque, Enum, BaseException, type)
    return classes.get(kind.__name__) is kind and not isinstance(value, plain)


def _attributes(value: object) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _node(value: Any, index: dict[int, int], classes: Classes, foreign: Foreign) -> list:
    kind = type(value)
    if value is None or value is Ellipsis or value is NotImplemented:
        return [str(value)]
    if isinstance(value, bool):
        return ["bool", bool(value)]
    if isinstance(value, Enum) and classes.get(kind.__name__) is kind:
        return ["enum", kind.__name__, value.name]
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, str):
        # Two halves of a character side by side are one character in JSON.
        return ["str", str.__str__(value)] if value.isascii() or _encodable(value) else ["points", list(map(ord, value))]
    if isinstance(value, bytes | bytearray):
        return ["bytearray" if isinstance(value, bytearray) else "bytes", value.hex()]
    if isinstance(value, range):
        return ["range", *(hex(part) for part in (value.start, value.stop, value.step))]
    if isinstance(value, Decimal):
        return ["Decimal", str(value)]
    if isinstance(value, Fraction):
        return ["Fraction", hex(value.numerator), hex(value.denominator)]
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    if not is_container(value, classes):
        return foreign.export(value)
    parts = [index[id(child)] for child in children(value, classes)]
    if _is_instance(value, classes):
        return ["instance", kind.__name__, parts]
    if isinstance(value, tuple):
        return ["named", kind.__name__, parts] if classes.get(kind.__name__) is kind else ["tuple", parts]
    if isinstance(value, frozenset):
        return ["frozenset", parts]
    if isinstance(value, defaultdict):
        factory = getattr(value.default_factory, "__name__", None)
        if FACTORIES.get(factory) is value.default_factory:
            return ["defaultdict", factory, parts]
    if isinstance(value, deque):
        return ["deque", value.maxlen, parts]
    plain = next((name for name, found in {**SEQUENCES, **MAPPINGS}.items() if kind is found), None)
    return [plain or next(name for name in ("list", "set", "dict") if isinstance(value, TYPES[name])), parts]


def _decode(graph: dict, classes: Classes, foreign: Foreign, known: Sequence[object]) -> tuple[list[Any], list[Any]]:
    nodes: list[Any] = graph["nodes"]
    built: list[Any] = []
    mutable: list[Any] = []
    if len(nodes) > MOST_NODES:
        raise ValueError("too many parts")
    # Mutable values first, empty: anything may refer to them.
    for number, node in enumerate(nodes):
        empty = known[number] if number < len(known) else _empty(node, classes)
        built.append(empty)
        if empty is not None:
            mutable.append(empty)
    filled = [number for number, value in enumerate(built) if value is not None and nodes[number] is not None]
    for number, node in enumerate(nodes):
        if built[number] is None:
            built[number] = _immutable(node, _Parts(built, number, nodes), classes, foreign)
    # Instances first: sets and mappings may hash them.
    for number in sorted(filled, key=lambda number: nodes[number][0] != "instance"):
        value = built[number]
        if isinstance(value, bytearray):
            value[:] = bytes.fromhex(nodes[number][1])
        else:
            _fill(value, nodes[number], [built[_place(part, len(nodes))] for part in nodes[number][-1]])
    return [built[_place(root, len(nodes))] for root in graph["roots"]], mutable


class _Parts:
    """What an immutable value holds: mutable values, or immutable ones before it."""

    def __init__(self, built: list[Any], number: int, nodes: list) -> None:
        self.built, self.number, self.nodes = built, number, nodes

    def __call__(self, numbers: list) -> list[Any]:
        for part in numbers:
            if _place(part, len(self.nodes)) >= self.number and self.built[part] is None:
                raise ValueError(f"part {part} comes after what holds it")
        return [self.built[part] for part in numbers]


def _place(number: object, most: int) -> int:
    if type(number) is not int or not 0 <= number < most:
        raise ValueError(f"no part {number}")
    return number


def _empty(node: list, classes: Classes) -> Any:
    """A mutable value before it is filled; None for an immutable one."""
    tag = node[0]
    if tag in ("list", "set", "dict", "OrderedDict", "Counter"):
        return {**SEQUENCES, **MAPPINGS}[tag]()
    if tag == "defaultdict":
        return defaultdict(FACTORIES[node[1]])
    if tag == "deque":
        return deque(maxlen=node[1])
    if tag == "bytearray":
        return bytearray()
    if tag == "instance":
        return object.__new__(classes[node[1]])
    return None


def _fill(value: Any, node: list, parts: list[Any]) -> None:
    tag = node[0]
    pairs = list(zip(parts[::2], parts[1::2], strict=True)) if tag in (*MAPPINGS, "defaultdict", "instance") else []
    if tag == "instance":
        for name in _attributes(value).keys() - {name for name, _ in pairs}:
            object.__delattr__(value, name)
        for name, part in pairs:
            object.__setattr__(value, name, part)
    elif isinstance(value, dict):
        value.clear()
        for key, part in pairs:
            value[key] = part
    elif isinstance(value, list):
        value[:] = parts
    elif isinstance(value, set):
        value.clear()
        value.update(parts)
    elif isinstance(value, deque):
        value.clear()
        value.extend(parts)


def _immutable(node: list, parts: _Parts, classes: Classes, foreign: Foreign) -> Any:
    tag, *payload = node
    match tag:
        case "None" | "Ellipsis" | "NotImplemented":
            return _SINGLE[tag]
        case "bool":
            return bool(payload[0])
        case "int":
            return int(payload[0], 16)
        case "float":
            return float.fromhex(payload[0])
        case "complex":
            return complex(float.fromhex(payload[0]), float.fromhex(payload[1]))
        case "str":
            return _text(payload[0])
        case "points":
            return "".join(map(chr, payload[0]))
        case "bytes":
            return bytes.fromhex(payload[0])
        case "range":
            return range(*(int(part, 16) for part in payload))
        case "Decimal":
            return Decimal(_text(payload[0]))
        case "Fraction":
            return Fraction(int(payload[0], 16), int(payload[1], 16))
        case "type":
            return TYPES[payload[0]]
        case "enum":
            return classes[payload[0]][payload[1]]  # type: ignore[index]
        case "tuple":
            return tuple(parts(payload[0]))
        case "named":
            return tuple.__new__(_subclass(classes[payload[0]]), parts(payload[1]))
        case "frozenset":
            return frozenset(parts(payload[0]))
        case "foreign":
            return foreign.restore(payload)
    raise ValueError(f"no kind of value: {tag}")


_SINGLE: dict[str, Any] = {"None": None, "Ellipsis": Ellipsis, "NotImplemented": NotImplemented}


def _subclass(found: type) -> type[tuple]:
    if not issubclass(found, tuple):
        raise TypeError(f"{found} is no tuple")
    return found


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
