"""A covering array: few cells in which every pair of values of two axes meets, unless no valid cell can hold that pair.

Pure and deterministic. What is valid is only asked of whole cells, one at a time, so that rules need not be written a second time
in a form that a generator can reason with. Greedy, one cell after another (Cohen, Dalal, Fredman and Patton, "The AETG System",
IEEE TSE 23(7), 1997), each improved value by value.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

Cell = dict[str, Any]
"""A value for each axis."""
Pair = tuple[tuple[str, Any], tuple[str, Any]]
"""Two (axis, value), in the order of the axes."""
Refusal = Callable[[Cell], str | None]
"""Why a cell is not valid; None if it is."""


@dataclass(frozen=True)
class CoveringArray:
    """`cells` hold every pair but those of `impossible`: pair -> why cells that hold it are refused."""

    cells: list[Cell]
    impossible: dict[Pair, list[str]]


def pairs_of(cell: Cell) -> set[Pair]:
    """Every pair that a cell holds."""
    return set(combinations(cell.items(), 2))


def all_pairs(axes: Mapping[str, Sequence[Any]]) -> list[Pair]:
    """Every pair of values of two axes, in order."""
    return [((first, a), (second, b)) for first, second in combinations(axes, 2) for a in axes[first] for b in axes[second]]


def completions(axes: Mapping[str, Sequence[Any]], pair: Pair, changes: int) -> Iterator[Cell]:
    """Cells that hold a pair, elsewhere the first value of each axis but for at most `changes` others; fewest changes first."""
    base = {axis: values[0] for axis, values in axes.items()} | dict(pair)
    fixed = {axis for axis, _ in pair}
    free = [axis for axis in axes if axis not in fixed]
    for number in range(min(changes, len(free)) + 1):
        for changed in combinations(free, number):
            for values in product(*(axes[axis][1:] for axis in changed)):
                yield base | dict(zip(changed, values, strict=True))


def covering_array(
    axes: Mapping[str, Sequence[Any]], refusal: Refusal, given: Sequence[Cell] = (), changes: int = 2
) -> CoveringArray:
    """Cells that hold every pair of values that some valid cell holds and none of the `given` cells.

    A pair counts as impossible once every cell is refused that holds it and differs from the first values of `axes` in at most
    `changes` other axes: with as many as there are axes that is a proof, at the price of all cells.
    """
    refused = _remembered(axes, refusal)
    cells: list[Cell] = []
    impossible: dict[Pair, list[str]] = {}
    held = {pair for cell in given for pair in pairs_of(cell)}
    missing = dict.fromkeys(pair for pair in all_pairs(axes) if pair not in held)
    for pair in list(missing):
        if all(refused(cell) is not None for cell in completions(axes, pair, changes)):
            impossible[pair] = _reasons(axes, pair, refused)
            del missing[pair]
    # What a pair adds to a cell that holds it: new ones count most, then those that few cells hold.
    worth = dict.fromkeys(all_pairs(axes), 0) | dict.fromkeys(missing, NEW)
    while missing:
        wanted = next(iter(missing))
        start = next(cell for cell in completions(axes, wanted, changes) if refused(cell) is None)
        best = _climb(axes, wanted, start, worth, refused)
        cells.append(best)
        for pair in pairs_of(best):
            worth[pair] = (0 if pair in missing else worth[pair]) - 1
            missing.pop(pair, None)
    return CoveringArray(cells, impossible)


def _value(cell: Cell, worth: Mapping[Pair, int]) -> int:
    return sum(worth[pair] for pair in combinations(cell.items(), 2))


def _reasons(axes: Mapping[str, Sequence[Any]], pair: Pair, refused: Refusal) -> list[str]:
    """Why cells near the first values are refused that hold a pair, and for no reason that stays without it."""
    without = {axis: axes[axis][0] for axis, _ in pair}
    near = ((refused(cell), refused(cell | without)) for cell in completions(axes, pair, 1))
    return list(dict.fromkeys(reason for reason, other in near if reason is not None and reason != other))


NEW = 1 << 20
"""Worth of a pair that no cell holds yet: more than any number of others."""


def _climb(axes: Mapping[str, Sequence[Any]], wanted: Pair, cell: Cell, worth: Mapping[Pair, int], refused: Refusal) -> Cell:
    """A valid cell that holds `wanted` and is worth so much that no change of one or two other values makes it worth more."""
    fixed = {axis for axis, _ in wanted}
    free = [axis for axis in axes if axis not in fixed]
    moves = [{axis: value} for axis in free for value in axes[axis]]
    moves += [{a: x, b: y} for a, b in combinations(free, 2) for x in axes[a] for y in axes[b]]
    value = _value(cell, worth)
    improved = True
    while improved:
        improved = False
        for move in moves:
            other = cell | move
            more = _value(other, worth)
            if more > value and refused(other) is None:
                cell, value, improved = other, more, True
    return cell


def _remembered(axes: Mapping[str, Sequence[Any]], refusal: Refusal) -> Refusal:
    """`refusal`, asked once a cell."""

    @cache
    def of_values(values: tuple[Any, ...]) -> str | None:
        return refusal(dict(zip(axes, values, strict=True)))

    return lambda cell: of_values(tuple(cell[axis] for axis in axes))
