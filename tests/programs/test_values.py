# ruff: noqa: E501 - one case a line
"""Promise: the values that tests and programs exchange arrive as they were: types, sharing, changes of arguments, exceptions. A
problem of every shape that HumanEval has is judged as it would be in one process."""

import math
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.programs import values
from mtp_dist.programs.problems import Problem
from mtp_dist.programs.sandbox import Limits, passes
from mtp_dist.programs.stubs import stub, stub_classes


class NoForeign:
    def export(self, value: object) -> list:
        return ["foreign", type(value).__name__]

    def restore(self, payload: list) -> object:
        return f"foreign {payload[0]}"


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


def there(*given: Any, **classes: type) -> Any:
    graph, _ = values.encode(given, classes, NoForeign())
    (found, *more), _ = values.decode(graph, classes, NoForeign())
    return [found, *more] if more else found


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.frozensets(st.integers(), max_size=1)
    ),
    max_leaves=20,
)


@given(PLAIN)
@settings(max_examples=300, deadline=None)
def test_plain_values_arrive(value: Any) -> None:
    assert repr(there(value)) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        -(2**64),
        -0.0,
        math.inf,
        -math.inf,
        5e-324,
        "\ud83d\ude00 \ud800",
        "\x00",
        bytearray(b"x"),
        range(3, 9, 2),
        ...,
        Decimal("1.10"),
        Fraction(1, 3),
        int,
        ValueError,
        Counter("aab"),
        OrderedDict([(2, 1), (1, 2)]),
        deque([1, 2], maxlen=5),
        defaultdict(list, {1: [2]}),
        {True: 1, (1, (2, frozenset([3]))): None},
        {1, 2, 3},
        [[]] * 3,
    ],
)
def test_values_of_the_standard_library_arrive(value: Any) -> None:
    found = there(value)
    assert type(found) is type(value) and repr(found) == repr(value)


def test_nan_depth_sharing_and_cycles() -> None:
    assert math.isnan(there(math.nan))
    deep: Any = ()
    for number in range(50_000):
        deep = (deep,) if number % 2 else [deep]
    found = there(deep)
    for _ in range(50_000):
        (found,) = found
    assert found == ()
    assert there(10**5000) == 10**5000
    shared = [1]
    both, same, inside = there(shared, shared, (shared,))
    assert both is same is inside[0]
    endless: list = []
    endless.append((endless,))
    found = there(endless)
    assert found[0][0] is found


def test_instances_travel_by_attributes_and_subclasses_as_plain_values() -> None:
    assert there(Point(3), Point=Point).x == 3
    assert there(Point(3)) == "foreign Point"
    assert type(there(type("Equal", (int,), {"__eq__": lambda *_: True})(7))) is int


@pytest.mark.parametrize(
    "graph",
    [
        {},
        {"nodes": 1, "roots": []},
        {"nodes": [], "roots": [0]},
        {"nodes": [["int", 3]], "roots": [0]},
        {"nodes": [["tuple", [0]]], "roots": [0]},
        {"nodes": [["tuple", [1]], ["tuple", [0]]], "roots": [0]},
        {"nodes": [["list", [-1]]], "roots": [0]},
        {"nodes": [["list", [True]]], "roots": [0]},
        {"nodes": [["dict", [0]]], "roots": [0]},
        {"nodes": [["set", [1]], ["list", []]], "roots": [0]},
        {"nodes": [["type", "eval"]], "roots": [0]},
        {"nodes": [["instance", "Popen", []]], "roots": [0]},
        {"nodes": [["defaultdict", "eval", []]], "roots": [0]},
        {"nodes": [[]], "roots": [0]},
        {"nodes": [["str", 3]], "roots": [0]},
        {"nodes": [["Decimal", [1]]], "roots": [0]},
        {"nodes": [None], "roots": [0]},
    ],
    ids=str,
)
def test_what_is_no_value_is_refused(graph: dict) -> None:
    with pytest.raises(values.MalformedError):
        values.decode(graph, {}, NoForeign())


HEAD = 'def f(a, b=0):\n    """What tests say."""\n'
RIGHT = {
    "types": (
        "return [a, (1.5, True), {'k': {2}}, None, 1j, 'λ']",
        "assert repr(candidate(7)) == repr([7, (1.5, True), {'k': {2}}, None, 1j, 'λ'])",
    ),
    "an argument changed in place": ("a.sort()", "x = [3, 1, 2]\n    assert candidate(x) is None and x == [1, 2, 3]"),
    "an argument changed before an exception": (
        "a.clear()\n    raise KeyError('k')",
        "x = {1: 2}\n    try: candidate(x)\n    except KeyError as e: assert e.args == ('k',) and x == {}\n    else: assert False",
    ),
    "the argument itself": ("return a", "x = [1]\n    assert candidate(x) is x"),
    "another one than the argument": ("return list(a)", "x = [1]\n    assert candidate(x) == x and candidate(x) is not x"),
    "a nested argument": ("a[0].append(a[1])", "x = [[], {}]\n    candidate(x)\n    assert x[0][0] is x[1]"),
    "while it is iterated over": ("return a[b]", "x = {1: 2, 3: 4}\n    for k in x: assert candidate(x, k) == x[k]"),
    "named arguments": ("return a - b", "assert candidate(b=1, a=3) == 2"),
    "an exception": (
        "raise ValueError(a)",
        "try: candidate(3)\n    except ValueError as e: assert str(e) == '3'\n    else: assert False",
    ),
    "an exception of its own": (
        "class Own(LookupError): pass\n    raise Own(a)",
        "try: candidate(3)\n    except LookupError: return\n    assert False",
    ),
    "memory between calls": ("f.n = getattr(f, 'n', 0) + a\n    return f.n", "assert [candidate(1), candidate(2)] == [1, 3]"),
    "an iterator": ("return (x * x for x in a)", "assert tuple(candidate([1, 2])) == (1, 4)"),
    "an endless iterator": (
        "import itertools\n    return itertools.count(a)",
        "x = candidate(5)\n    assert [next(x), next(x)] == [5, 6]",
    ),
    "a view": ("return dict.fromkeys(a).keys()", "assert sorted(candidate('ba')) == ['a', 'b']"),
    "a function that is handed in": ("return [b(x) for x in a]", "assert candidate([1, 2], lambda x: x + 1) == [2, 3]"),
    "a function that comes out": ("return lambda x: x + a", "assert candidate(3)(4) == 7"),
    "a function that fails": (
        "try: b(a)\n    except ZeroDivisionError: return 'caught'",
        "assert candidate(0, lambda x: 1 / x) == 'caught'",
    ),
    "there and back": ("return b", "g = lambda: 1\n    assert candidate(0, g) is g"),
    "an iterator that is handed in": ("return sum(a)", "assert candidate(x for x in range(4)) == 6"),
    "an object": ("class Own:\n        def double(self): return 2 * a\n    return Own()", "assert candidate(4).double() == 8"),
    "its own name": (
        "return f(a - 1) + 1 if a else 0",
        "assert candidate(5) == f(5) == 5 and candidate.__name__ == 'f' and candidate.__doc__ == 'What tests say.'",
    ),
    "random tests": (
        "return sorted(a)",
        "import random, copy\n    for _ in range(50):\n        x = [random.random() for _ in range(9)]\n        assert candidate(copy.deepcopy(x)) == sorted(x)",
    ),
}
"""(body, test)"""


def test_the_same_tests_fail_a_wrong_program() -> None:
    """All in one problem, since each alone would cost two processes."""
    checks = "".join(f"def check{number}(candidate):\n    {test}\n" for number, (_, test) in enumerate(RIGHT.values()))
    every = (
        f"{checks}def check(candidate):\n    for number in range({len(RIGHT)}):\n"
        "        try: globals()[f'check{number}'](candidate)\n        except Exception: continue\n        raise SystemExit\n"
    )
    assert passes(Problem("own/all", HEAD, every, "f"), "    return 'something else'\n", Limits(seconds=20.0))


@pytest.mark.parametrize("what", RIGHT)
def test_tests_see_what_they_would_see_in_one_process(what: str) -> None:
    body, test = RIGHT[what]
    problem = Problem(what, HEAD, f"def check(candidate):\n    {test}\n", "f")
    limits = Limits(seconds=20.0)
    here: dict[str, Any] = {}
    exec(f"{HEAD}    {body}\n{problem.test}\ncheck(f)", here)
    assert passes(problem, f"    {body}\n", limits)


HELPERS = '''import math
from typing import List


def poly(xs: list, x: float):
    """Evaluates a polynomial."""
    return sum(coeff * math.pow(x, i) for i, coeff in enumerate(xs))


class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next

    def __eq__(self, other):
        return isinstance(other, Node) and (self.value, self.next) == (other.value, other.next)


class Lost(Exception):
    pass


def solve(xs: List[int], *more):
    """
    >>> solve([1, 2])
    """
'''


def test_tests_use_the_problems_helpers_not_the_programs() -> None:
    """As HumanEval/32, /38 and /50, whose tests call the other function of a pair; and classes of the problem."""
    test = "def check(candidate):\n    assert abs(poly([1, 2], candidate([1, 2]))) < 1e-4 and math.pi > 3\n"
    problem = Problem("own/helpers", HELPERS, test, "solve")
    assert passes(problem, "    return -xs[0] / xs[1]\n", Limits(seconds=20.0))
    cheat = "    return 0\n\n\ndef poly(xs, x):\n    return 0\n"
    assert not passes(problem, cheat, Limits(seconds=20.0))
    chain = "def check(candidate):\n    one = Node(1, Node(2))\n    two = candidate(one)\n    assert two == Node(2, Node(1)) and one.value == 1\n"
    chain += "    try: candidate(None)\n    except Lost: return\n    assert False\n"
    reverse = "    if xs is None: raise Lost\n    last = None\n    while xs: last, xs = Node(xs.value, last), xs.next\n    return last\n"
    assert passes(Problem("own/classes", HELPERS, chain, "solve"), reverse, Limits(seconds=20.0))
    assert not passes(Problem("own/classes", HELPERS, chain, "solve"), "    return xs\n", Limits(seconds=20.0))


def test_a_prompt_becomes_a_module() -> None:
    assert stub(HEAD) == HEAD and stub_classes(HELPERS, "solve") == ["Node", "Lost"] and stub_classes(HELPERS, "Node") == ["Lost"]
    for prompt in (
        "def f(a):\n",
        "def f(a):\n    if a:\n",
        "def f(a):\n    '''open",
        "def f(a):\n    return (",
        "def f(a):\n\tx = 1\n\tif a:\n",
    ):
        found: dict[str, Any] = {}
        exec(stub(prompt), found)
        assert "f" in found
    assert stub("def f(") == ""
