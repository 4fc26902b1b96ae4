"""What one rank finds out, all ranks act on: a rank that raised alone between collectives would leave the others waiting."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from mtp_dist.errors import AgreedError, UserError
from mtp_dist.parallel.mesh import Mesh

T = TypeVar("T")


def together(mesh: Mesh, action: Callable[[], T]) -> T:
    """`action()` on every rank; if it raises a UserError on any, every rank raises that as AgreedError. Collective; `action` is
    not."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    raise_together(mesh, problem)
    return result  # type: ignore[return-value]


def raise_together(mesh: Mesh, problem: str | None) -> None:
    """Raise the first rank's problem on every rank, if any has one. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=mesh.control)
    first = next((entry for entry in problems if entry), None)
    if first is not None:
        raise AgreedError(first)
