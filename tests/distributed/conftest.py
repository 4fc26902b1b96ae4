"""One pool a world size for the whole session, made when the first test asks for it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.distributed.layouts import LAYOUTS, world
from tests.distributed.pool import run_jobs


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """layout -> results of ``tasks.parity`` on each rank."""

    @cache
    def of_world(size: int) -> dict[str, list[Any]]:
        jobs = [{"name": name, "task": "parity", "arguments": {"layout": name}} for name in LAYOUTS if world(name) == size]
        return run_jobs(size, jobs, tmp_path_factory.mktemp(f"world{size}"))

    return lambda layout: of_world(world(layout))[layout]
