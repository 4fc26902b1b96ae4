"""What one rank finds out, all ranks act on: a rank that raised alone between collectives would leave the others waiting."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from mtp_dist.errors import AgreedError, UserError
from mtp_dist.parallel.mesh import Mesh

T = TypeVar("T")


def together(mesh: Mesh, action: Callable[[], T]) -> T:
    """`action()` on every rank; if it raises a UserError or an OSError on any, every rank raises that as AgreedError. Collective;
    `action` is not."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = disk_trouble(error)
    raise_together(mesh, problem)
    return result  # type: ignore[return-value]


def raise_together(mesh: Mesh, problem: str | None) -> None:
    """Raise the first rank's problem on every rank, if any has one. Collective."""
    first = first_problem(mesh, problem)
    if first is not None:
        raise AgreedError(first)


def first_problem(mesh: Mesh, problem: str | None) -> str | None:
    """The first rank's problem, on every rank. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=mesh.control)
    return next((entry for entry in problems if entry), None)


def disk_trouble(error: OSError, file: object = None) -> str:
    """``runs/a/metrics.jsonl: No space left on device``."""
    place = file if file is not None else error.filename
    return f"{place}: {error.strerror or error}" if place is not None else str(error.strerror or error)
