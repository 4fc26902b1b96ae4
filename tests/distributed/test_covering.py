"""Promise: the generated cells hold every pair of values that may be together, none that may not, and are few.

A pair that is called impossible is so: proved from all cells for small sets of axes, and for the grid's own in a full run.
"""

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed.cells import AXES, CELLS, MOST, ORDINARY, covering, name_of, refusal, settings_of
from tests.distributed.covering import Cell, all_pairs, completions, covering_array, pairs_of
from tests.distributed.layouts import PATHS, configuration, processes


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], list[Cell]]:
    """Axes, and parts of cells that are refused."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    axes = {f"axis{i}": tuple(range(size)) for i, size in enumerate(sizes)}
    value = {axis: st.sampled_from(values) for axis, values in axes.items()}
    parts = st.lists(st.sampled_from(list(axes)), min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: value[name] for name in names})
    )
    return axes, draw(st.lists(parts, max_size=8))


def rule(refused: list[Cell]) -> Any:
    return lambda cell: next((f"not {part}" for part in refused if part.items() <= cell.items()), None)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_possible_pair_is_held_and_no_other(problem: Any) -> None:
    axes, refused = problem
    refusal = rule(refused)
    every = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    possible = {pair for cell in every if refusal(cell) is None for pair in pairs_of(cell)}
    array = covering_array(axes, refusal, changes=len(axes))
    assert all(refusal(cell) is None for cell in array.cells)
    assert {pair for cell in array.cells for pair in pairs_of(cell)} == possible
    assert set(array.impossible) == set(all_pairs(axes)) - possible
    assert covering_array(axes, refusal, changes=len(axes)) == array
    seen: set[Any] = set()
    for cell in array.cells:
        assert pairs_of(cell) - seen, "a cell that adds nothing"
        seen |= pairs_of(cell)
    assert covering_array(axes, refusal, given=array.cells, changes=len(axes)).cells == []


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 4), min_size=2, max_size=6))
def test_it_is_small(sizes: list[int]) -> None:
    """At least the product of the two longest axes is needed."""
    axes = {f"axis{i}": tuple(range(size)) for i, size in enumerate(sizes)}
    least = sorted(sizes)[-1] * sorted(sizes)[-2]
    assert least <= len(covering_array(axes, lambda cell: None).cells) <= 2 * least + 2


def test_a_reason_is_that_of_the_pair() -> None:
    axes = {"a": (0, 1), "b": (0, 1), "c": (0, 1)}
    array = covering_array(axes, rule([{"a": 1, "b": 1}, {"c": 1, "a": 0}]))
    assert array.impossible[("a", 1), ("b", 1)] == ["not {'a': 1, 'b': 1}"]


def test_the_grid_holds_every_pair_once_it_can() -> None:
    array = covering()
    held = {pair for cell in array.cells for pair in pairs_of(cell)}
    assert held | set(array.impossible) == set(all_pairs(AXES))
    assert not held & set(array.impossible)
    assert all(array.impossible.values()), "each impossible pair has its reason"
    for cell in array.cells:
        configuration(settings_of(cell))  # raises where a rule is broken
        assert processes(cell) <= MOST
        assert name_of(cell) in CELLS
    assert len(array.cells) <= 64
    small = {pair for cell in array.cells if processes(cell) <= ORDINARY for pair in pairs_of(cell)}
    for cell in array.cells:
        if processes(cell) > ORDINARY:
            assert pairs_of(cell) - small, "a cell of many processes that adds nothing"


def test_every_setting_of_a_layout_reaches_the_configuration() -> None:
    assert set(AXES) <= set(PATHS)
    for cell in covering().cells:
        config = configuration(settings_of(cell))
        for axis, value in cell.items():
            group, _, field = PATHS[axis].partition(".")
            assert getattr(getattr(config, group), field) == value


@pytest.mark.full
def test_impossible_pairs_of_the_grid_are_in_no_cell() -> None:
    for pair in covering().impossible:
        assert all(refusal(cell) is not None for cell in completions(AXES, pair, changes=4)), pair
