"""Layouts run when the first test asks for them, in the pool of their world size."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.distributed.layouts import processes
from tests.distributed.pool import run_jobs


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """Name in ``CELLS`` -> results of ``tasks.parity`` on each rank."""
    from tests.distributed.cells import CELLS  # generated: seconds that only those pay who ask

    @cache
    def of(name: str) -> list[Any]:
        job = {"name": "cell", "task": "parity", "arguments": {"layout": CELLS[name]}}
        return run_jobs(processes(CELLS[name]), [job], tmp_path_factory.mktemp("cell"))["cell"]

    return of
