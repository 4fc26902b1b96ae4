"""Promise: ``train.compile`` compiles every block, whole, and leaves the model what it was: the one-process reference's losses,
gradients and weights in every kind of layout.

Tolerance, float32: that of the parity grid; fused operations only change the order of sums. bfloat16: compiled code rounds at
other places, so its gradients are held to be as near to the float32 ones as those of uncompiled blocks (1% to 2% for either),
within half as much again: single parameters are lucky or unlucky. Sums in bfloat16 would be no such thing: the dtype is asserted.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist.tracking import names
from mtp_dist.tracking.jsonl import read_records
from tests.distributed.comparison import beyond, expected
from tests.distributed.pool import run_jobs

FLOAT32: dict[str, dict[str, str]] = {
    "pp2_zbv": {},
    "pp2_1f1b": {"recompute": "full"},
    "tp2_sequence": {},
}
BFLOAT16 = {"dtype": "bfloat16"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> dict[str, list[Any]]:
    """Job -> what each rank found: the layouts of ``FLOAT32``, and pp2_zbv in bfloat16 "compiled" and "plain". "folder": where
    the runs "straight" and "resumed" are."""
    jobs = [{"name": name, "task": "compiled", "arguments": {"layout": name, **train}} for name, train in FLOAT32.items()]
    jobs.append({"name": "compiled", "task": "compiled", "arguments": {"layout": "pp2_zbv", **BFLOAT16}})
    jobs.append({"name": "plain", "task": "parity", "arguments": {"layout": "pp2_zbv", **BFLOAT16}})
    folder = tmp_path_factory.mktemp("compile")
    for name, stops in (("straight", []), ("resumed", [2])):
        arguments = {"layout": "pp2_zbv", "data": str(tiny_dataset), "run_dir": str(folder / name), "steps": 4, "stops": stops}
        overrides = {"train.compile": True, "validation.every_steps": 1}
        jobs.append({"name": name, "task": "train", "arguments": arguments | {"overrides": overrides}})
    return run_jobs(2, jobs, folder) | {"folder": [folder]}


@pytest.mark.parametrize("job", [*FLOAT32, "compiled"])
def test_blocks_are_compiled_whole(results: dict[str, list[Any]], job: str) -> None:
    """One graph serves all blocks of a rank in training and one in evaluation; nothing was left to Python."""
    for found in results[job]:
        assert (found["graphs"], found["breaks"]) == (2, {})


@pytest.mark.parametrize("layout", FLOAT32)
def test_compiled_blocks_are_the_same_model(results: dict[str, list[Any]], layout: str) -> None:
    assert beyond(results[layout], layout) == {}


def test_bfloat16_gradients_are_added_up_in_float32(results: dict[str, list[Any]]) -> None:
    for found, plain in zip(results["compiled"], results["plain"], strict=True):
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3)
        assert found["norms"] == pytest.approx(plain["norms"], rel=1e-2)
        for name, (_, _, gradient) in found["gradients"].items():
            want = expected("pp2_zbv")["gradients"][name]
            assert gradient.dtype == torch.float32
            assert (gradient - want).norm() <= 1.5 * (plain["gradients"][name][2] - want).norm(), name


def test_a_compiled_run_resumes_to_the_same_bits(results: dict[str, list[Any]]) -> None:
    compared = (names.LOSS_TOTAL, names.GRADIENT_NORM, names.VALIDATION_LOSS_TOTAL)
    straight, resumed = (
        [[record[name] for name in compared] for record in read_records(results["folder"][0] / run / "metrics.jsonl")]
        for run in ("straight", "resumed")
    )
    assert len(straight) == 4
    assert straight == resumed
