"""Promise: the comparison with the reference can fail. Products that are broken but train all the same are told from sound ones,
in bfloat16, whose tolerances are wide, and so in float32."""

from pathlib import Path

import pytest

from tests.distributed.comparison import beyond
from tests.distributed.layouts import LAYOUTS, processes
from tests.distributed.pool import run_jobs

BROKEN = [
    ("doubled gradient", "pp2_zbv", "gradient"),
    ("no sum over the embedding's copies", "pp2_1f1b", "master"),
    ("replicas counted twice", "pp2_1f1b", "norm"),
    ("replicas counted twice", "tp2", "norm"),
    ("no sum over ranks that share a head", "tp2_one_key", "master"),
    ("a replica lost", "dp2_zero1", "master"),
]


@pytest.mark.parametrize(("fault", "layout", "kind"), BROKEN)
def test_a_broken_product_is_noticed(fault: str, layout: str, kind: str, tmp_path: Path) -> None:
    settings = LAYOUTS[layout] | {"dtype": "bfloat16"}
    job = {"name": "broken", "task": "parity", "arguments": {"layout": settings, "fault": fault}}
    found = beyond(run_jobs(processes(settings), [job], tmp_path)["broken"], settings, kind)
    print(found)
    assert found
