"""Promise: any layout goes on from any other's checkpoint, without a conversion: losses, norms and the final masters and
moments are those of a run that never changed its layout.

Tolerance, float32: as in tests/distributed/comparison.py, 1e-5 of the largest element for a step; five steps add up.
"""

from pathlib import Path

import pytest

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.parallel.engine import PARTS
from mtp_dist.tracking.jsonl import read_records
from tests.distributed.pool import run_jobs

RELAYS = {
    2: [
        "pp2_zbv", "tp2", "dp2_zero1", "pp2_1f1b", "tp2_sequence", "dp2_zero0", "pp2_interleaved", "dp2_zero2", "dp2_zero3",
        "pp2_zbv"],
    4: ["pp2_zbv_tp2", "tp2_dp2", "pp2_1f1b_dp2", "pp2_1f1b_tp2_sequence", "pp2_zbv_dp2_zero0", "tp2_dp2_zero3", "pp2_zbv_tp2"],
}
FLOAT32 = {"train.dtype": "float32"}


SAMPLED = {"mtp.scheduled_sampling": 0.5}
"""Own predictions here and there: draws that depended on a replica, a micro-batch or a start would give other losses."""


@pytest.mark.parametrize(("world", "overrides"), [*((world, {}) for world in RELAYS), (2, SAMPLED)])
def test_a_run_handed_from_layout_to_layout(
    world: int, overrides: dict[str, float], tmp_path: Path, tiny_dataset: Path
) -> None:
    layouts = RELAYS[world]
    runs = {"relay": layouts, "same": [layouts[0]] * len(layouts)}
    jobs = []
    for name, order in runs.items():
        places = {"data": str(tiny_dataset), "run_dir": str(tmp_path / name)}
        jobs.append({"name": name, "task": "relay", "arguments": {"layouts": order, **places, "overrides": FLOAT32 | overrides}})
    run_jobs(world, jobs, tmp_path)
    relay, same = (read_records(tmp_path / name / "metrics.jsonl") for name in runs)
    assert [record["step"] for record in relay] == list(range(1, len(layouts) + 1))
    for one, other in zip(relay, same, strict=True):
        for metric in ("loss/total", "loss/main", "loss/depth_2", "optim/gradient_norm"):
            assert one[metric] == pytest.approx(other[metric], rel=2e-5), (one["step"], metric)
    ends = [Checkpoint(tmp_path / name / "checkpoints" / f"step_{len(layouts):08d}") for name in runs]
    assert ends[0].manifest.parameters.keys() == ends[1].manifest.parameters.keys()
    for name in ends[0].manifest.parameters:
        for part in PARTS:
            found, expected = ends[0].read(name, part), ends[1].read(name, part)
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), (name, part)
