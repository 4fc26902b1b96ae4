"""Shapes of static trees of drafts, as Medusa writes them (arXiv 2401.10774, section 2.3.2). No torch.

A shape is a list of nodes, each the path to it: [0, 2] is the third choice behind the first choice. Choices are counted from the
likeliest one, or in the order in which they are drawn.
"""

from collections.abc import Sequence

Path = tuple[int, ...]


def default_shape(depth: int, nodes: int, width: int) -> list[Path]:
    """The ``nodes`` likeliest paths of at most ``depth`` choices out of ``width``, were choice r right with probability
    1/2^(r+1): the first half the time, each other half as often as the one before. Of equally likely paths longer go first."""
    found: list[Path] = []
    for total in range(1, depth * width + 1):
        found += sorted(_totalling(total, depth, width), key=lambda path: (-len(path), path))
        if len(found) >= nodes:
            break
    return ordered(found[:nodes])


def _totalling(total: int, depth: int, width: int) -> list[Path]:
    """Paths of probability 1/2^total: their choices, each plus one, add up to it."""
    if total == 0:
        return [()]
    if depth == 0:
        return []
    return [(r, *rest) for r in range(min(width, total)) for rest in _totalling(total - r - 1, depth - 1, width)]


def ordered(paths: Sequence[Sequence[int]]) -> list[Path]:
    """Parents before children, siblings in the order of their choices."""
    return sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))


def fault(paths: Sequence[Sequence[int]]) -> str | None:
    """What is wrong with a shape; None where nothing is."""
    known = {tuple(path) for path in paths}
    if len(known) < len(paths):
        return "names a node twice"
    for path in ordered(paths):
        if not path or min(path) < 0:
            return "holds an empty path or a choice below 0"
        if len(path) > 1 and path[:-1] not in known:
            return f"lacks {list(path[:-1])}, the parent of {list(path)}"
        if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in known:
            return f"lacks {[*path[:-1], path[-1] - 1]}, the choice before {list(path)}"
    return None


def deepest(paths: Sequence[Sequence[int]]) -> int:
    """Choices of the longest path."""
    return max(map(len, paths))
