"""Promise: a run that is stopped and started again is, bit for bit, the run that was never stopped; and validation leaves no
trace in training."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.parallel.engine import PARTS
from tests.distributed.layouts import world
from tests.distributed.pool import run_jobs

STEPS = 6
RESUMED = [
    "one_process",
    "pp2_1f1b",
    "pp2_zbv",
    "pp2_dualpipev",
    "pp2_interleaved",
    "tp2",
    "tp2_sequence",
    "dp2_zero0",
    "dp2_zero1",
    "dp2_zero2",
    "dp2_zero3",
    "dp2_zero3_frozen",
    "pp2_1f1b_frozen",
    "pp2_zbv_frozen",
    "pp2_zbv_heads_alone_parallel",
    "pp2_1f1b_repeat",
    "dp2_medusa",
    "pp2_zbv_curriculum",
    "dp2_stride",
    "dp2_zero3_curriculum",
    "tp2_sequence_notebook",
    "tp2_sequence_soft",
    "pp2_1f1b_medusa_own",
    "tp2_sequence_koala",
    "pp2_1f1b_frozen_eagle",
    "pp2_zbv_eagle3",
    "pp2_zbv_eagle_draft_vocabulary",
    "pp2_1f1b_own_matrices",
    "tp2_sequence_sampled",
    "dp2_zero3_own_matrices_sampled_notebook",
    "pp2_zbv_tp2",
    "pp2_1f1b_tp2",
    "pp2_zbv_dp2",
    "pp2_1f1b_dp2",
    "pp2_zbv_dp2_zero0",
    "tp2_dp2",
    "tp2_dp2_zero3",
    "tp2_one_key",
    "tp4_shared_keys_sequence_eagle3",
    "pp2_zbv_tp2_one_key_sequence",
    "tp2_dp2_one_key_zero3",
    "tp4_one_key_frozen",
    "pp2_1f1b_few",
    "pp4_1f1b_few",
]
ORDINARY = {"one_process", "pp2_1f1b", "pp2_zbv", "tp2_sequence", "dp2_zero0", "dp2_zero1", "dp2_zero3", "pp2_zbv_tp2",
            "tp2_one_key", "dp2_medusa", "pp2_zbv_eagle3", "pp2_zbv_curriculum", "tp2_sequence_sampled"}  # fmt: skip
"""The others are for a full run."""
LAYOUTS = [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.full) for name in RESUMED]
EXACT = ("loss/total", "loss/main", "loss/depth_1", "loss/depth_2", "optim/gradient_norm", "optim/lr", "data/tokens_seen")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Callable[[str], dict[str, Path]]:
    """layout -> run folders: "whole" (validated at every step), "parts" (stopped once, never validated before the end)."""

    @cache
    def of(layout: str) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp(layout)
        jobs, places = [], {kind: folder / kind for kind in ("whole", "parts")}
        for kind, stops, overrides in (("whole", [], {"validation.every_steps": 1}), ("parts", [3], {})):
            arguments = {
                "layout": layout,
                "data": str(tiny_dataset),
                "run_dir": str(places[kind]),
                "steps": STEPS,
                "stops": stops,
                "overrides": overrides,
            }
            jobs.append({"name": f"{layout}-{kind}", "task": "train", "arguments": arguments})
        run_jobs(world(layout), jobs, folder)
        return places

    return of


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_after_resume(runs: Any, layout: str) -> None:
    whole, parts = (records(run) for run in runs(layout).values())
    assert [record["step"] for record in parts] == [record["step"] for record in whole] == list(range(1, STEPS + 1))
    for a, b in zip(whole, parts, strict=True):
        for name in EXACT:
            assert a.get(name) == b.get(name), (a["step"], name)
    assert len({record["loss/main"] for record in whole}) == STEPS, "a loss that never changes proves nothing"
    assert "validation/loss_main" in whole[0]
    assert "validation/loss_main" not in parts[0]
    assert whole[-1]["validation/loss_main"] == parts[-1]["validation/loss_main"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_final_checkpoint(runs: Any, layout: str) -> None:
    files = {}
    for kind, run in runs(layout).items():
        folder = run / "checkpoints" / f"step_{STEPS:08d}"
        files[kind] = {path.name: load_file(path) for path in sorted(folder.glob("rank_*.safetensors"))}
    assert files["whole"].keys() == files["parts"].keys()
    for name, tensors in files["whole"].items():
        assert tensors.keys() == files["parts"][name].keys()
        for key, value in tensors.items():
            assert value.equal(files["parts"][name][key]), (name, key)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_holds_each_element_once(runs: Any, layout: str) -> None:
    checkpoint = Checkpoint(runs(layout)["whole"] / "checkpoints" / f"step_{STEPS:08d}")
    assert checkpoint.damages() == []
    model = checkpoint.load_model()
    assert {name for name, _ in model.named_parameters()} == set(checkpoint.manifest.parameters)
    for name, record in checkpoint.manifest.parameters.items():
        held = sum(fragment.end - fragment.begin for fragment in record.fragments)
        assert held == model.get_parameter(name).numel(), name
        for part in PARTS:
            assert checkpoint.read(name, part).isfinite().all()
