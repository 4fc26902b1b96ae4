"""Promise: under ``mtp.freeze_trunk`` a run keeps the exact weights that it was handed, in bfloat16 too and under any layout, and
lets go of their moments; a trunk that learns again starts with fresh ones, as AdamW's first step does."""

from pathlib import Path

import pytest
import torch

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.parallel.engine import MOMENTS
from tests.distributed.pool import run_jobs

LAYOUTS = ["pp2_zbv", "dp2_zero1", "dp2_zero3_frozen", "pp2_1f1b_frozen", "pp2_1f1b", "dp2_zero3"]
"""The layout of each step: two of the whole model, two of the heads, two of the whole model."""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> list[Checkpoint]:
    """The checkpoints after steps 1 to 6 of a run in bfloat16."""
    folder = tmp_path_factory.mktemp("frozen")
    overrides = {"checkpoint.keep_last": 0, "schedule.warmup_tokens": 0}
    places = {"data": str(tiny_dataset), "run_dir": str(folder / "run")}
    arguments = {"layouts": LAYOUTS, **places, "overrides": overrides}
    run_jobs(2, [{"name": "frozen", "task": "relay", "arguments": arguments}], folder)
    return [Checkpoint(folder / "run" / "checkpoints" / f"step_{step:08d}") for step in range(1, len(LAYOUTS) + 1)]


def test_weights_of_a_frozen_trunk_stay_bit_for_bit(steps: list[Checkpoint]) -> None:
    trained, frozen, again = steps[1], steps[3], steps[4]
    for name in trained.manifest.parameters:
        kept = trained.read(name, "master").equal(frozen.read(name, "master"))
        assert kept != name.startswith("mtp."), name
        assert not frozen.read(name, "master").equal(again.read(name, "master")), name
    assert not all(
        trained.read(name, "master").equal(trained.read(name, "master").bfloat16().float())
        for name in trained.manifest.parameters
    ), "weights that are rounded ones prove nothing"


def test_moments_go_and_come_back_fresh(steps: list[Checkpoint]) -> None:
    trained, frozen, again = steps[1], steps[3], steps[4]
    for name, record in frozen.manifest.parameters.items():
        heads = name.startswith("mtp.")
        assert record.moments == heads
        assert trained.manifest.parameters[name].moments
        for moment in MOMENTS:
            assert bool(frozen.read(name, moment).any()) == heads, name
            assert again.read(name, moment).any(), name
    counted = [checkpoint.manifest.optimizer["steps"] for checkpoint in steps]
    assert counted[1] == {"trunk": 2, "heads": 2}
    assert counted[3] == {"trunk": 0, "heads": 4}
    assert counted[5] == {"trunk": 2, "heads": 6}


def test_a_frozen_checkpoint_is_a_whole_model(steps: list[Checkpoint]) -> None:
    frozen = steps[3]
    assert frozen.damages() == []
    model = frozen.load_model(torch.float32)
    for name, p in model.named_parameters():
        assert p.equal(frozen.read(name, "master"))
