"""Promise: a step whose loss or gradient is not finite on any rank changes nothing on any rank, is kept for a look, and ends the
run or is skipped, as the settings say; the learning rate follows applied steps alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, safe_open

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.layout import tokens_per_step
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.stream import Stream
from mtp_dist.tracking.jsonl import read_records
from mtp_dist.training.learning_rate import learning_rate
from tests.distributed.pool import run_jobs

STEPS = 5
# Without bfloat16 DeepSpeed finds overflow by the norm, with it by looking at every gradient: both ways are run.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dp2_zero0": ("dp2_zero0", {}),
    "dp2_zero1": ("dp2_zero1", {}),
    "dp2_zero1_float32": ("dp2_zero1", {"train.dtype": "float32"}),
    "pp2_zbv": ("pp2_zbv", {}),
    "dp2_zero1_offload": ("dp2_zero1_offload", {}),
    "dp2_zero2": ("dp2_zero2", {}),
    "dp2_zero3": ("dp2_zero3", {}),
}
SKIP = {"train.nonfinite": "skip"}
# policy -> steps that are poisoned, how, settings
POLICIES: dict[str, tuple[list[int], str, dict[str, Any]]] = {
    "stop": ([3], "loss", {}),
    "skip": ([2, 4], "gradient", SKIP),
    "limit": ([2, 3, 4], "loss", SKIP | {"train.nonfinite_limit": 2}),
}
Ended = Callable[[str, str], tuple[list[Any], Path]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Ended:
    """(case, policy) -> (results of ``tasks.nonfinite`` on each rank, run folder). Beside: "clean", never poisoned;
    "again", the run that stopped, started again without poison."""
    folder = tmp_path_factory.mktemp("nonfinite")
    jobs = []
    for case, (layout, overrides) in CASES.items():
        runs = {**POLICIES, "clean": ([], "loss", {}), "again": ([], "loss", {})}
        for policy, (at, kind, more) in runs.items():
            arguments = {
                "layout": layout,
                "data": str(tiny_dataset),
                "run_dir": str(folder / case / ("stop" if policy == "again" else policy)),
                "steps": STEPS,
                "at": at,
                "kind": kind,
                "overrides": overrides | more,
            }
            jobs.append({"name": f"{case}-{policy}", "task": "nonfinite", "arguments": arguments})
            if policy == "stop":
                jobs.append({"name": f"{case}-look", "task": "copy", "arguments": {"run_dir": arguments["run_dir"]}})
    results = run_jobs(2, jobs, folder)

    def of(case: str, policy: str) -> tuple[list[Any], Path]:
        return results[f"{case}-{policy}"], folder / case / {"stop": "stop-look", "again": "stop"}.get(policy, policy)

    return of


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_only_poisoned_steps_are_dropped_and_they_change_nothing(ended: Ended, case: str, policy: str) -> None:
    poisoned = POLICIES[policy][0]
    for result in ended(case, policy)[0]:
        for number, step in enumerate(result["steps"], start=1):
            assert step["applied"] == (number not in poisoned)
            assert step["unchanged"] == (number in poisoned), "weights, masters, moments or AdamW's count moved"


@pytest.mark.parametrize("case", CASES)
def test_stop_ends_on_every_rank_with_the_last_good_step_saved(ended: Ended, case: str) -> None:
    results, run = ended(case, "stop")
    for result in results:
        assert result["error"] is not None
        assert result["error"] == results[0]["error"]
        assert "step 3: loss nan" in result["error"]
        assert "train.nonfinite=skip" in result["error"]
        assert "\n" not in result["error"]
        assert (result["progress"].step, result["progress"].skipped) == (2, 0)
    assert (status(run)["state"], status(run)["step"]) == ("failed", 2)
    checkpoint = Checkpoint(run / "checkpoints" / "step_00000002")
    assert checkpoint.damages() == []
    assert checkpoint.manifest.progress["tokens_trained"] == 2 * tokens_per_step(results[0]["config"])
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("case", CASES)
def test_the_rows_of_the_step_are_kept(ended: Ended, tiny_dataset: Path, case: str) -> None:
    """Exactly what the stream hands out as the third batch, with the keys of its samples, for each replica that reads."""
    results, run = ended(case, "stop")
    config = results[0]["config"]
    kept = run / "nonfinite" / "step_00000003"
    names = [f"replica_{replica:05d}" for replica in range(config.parallel.data)]
    assert sorted(path.name for path in kept.iterdir()) == sorted(f"{n}.{e}" for n in names for e in ("json", "safetensors"))
    for replica, name in enumerate(names):
        stream = Stream(
            Dataset.open(tiny_dataset),
            "train",
            rows=config.train.global_batch,
            sequence_length=config.train.sequence_length,
            ahead=config.mtp.depth,
            lanes=config.data.lanes,
            block_samples=config.data.block_samples,
            mix_tokens=config.data.mix_tokens,
            seed=config.seed,
            replica=replica,
            replicas=config.parallel.data,
        )
        batch = [stream.next()[0] for _ in range(3)][-1]
        stream.close()
        tensors = load_file(kept / f"{name}.safetensors")
        assert tensors["tokens"].equal(batch.tokens)
        assert tensors["documents"].equal(batch.documents)
        record = json.loads((kept / f"{name}.json").read_text())
        assert record["samples"] == batch.samples
        assert all(record["samples"])
        assert (record["step"], record["replica"], record["loss"]) == (3, replica, "nan")


@pytest.mark.parametrize("case", CASES)
def test_started_again_after_a_stop_it_is_as_if_nothing_had_happened(ended: Ended, case: str) -> None:
    (again, run), (clean, other) = ended(case, "again"), ended(case, "clean")
    assert [result["error"] for result in (*again, *clean)] == [None] * 4
    assert status(run)["state"] == "finished"
    names = ("step", "loss/total", "loss/depth_2", "optim/gradient_norm", "optim/lr", "data/tokens_seen")
    kept = [[record.get(name) for name in names] for record in read_records(run / "metrics.jsonl")]
    assert kept == [[record.get(name) for name in names] for record in read_records(other / "metrics.jsonl")]
    assert [row[0] for row in kept] == list(range(1, STEPS + 1))
    folder = Path("checkpoints") / f"step_{STEPS:08d}"
    for rank in range(2):
        with (
            safe_open(run / folder / f"rank_{rank:05d}.safetensors", "pt") as a,
            safe_open(other / folder / f"rank_{rank:05d}.safetensors", "pt") as b,
        ):
            assert set(a.keys()) == set(b.keys())
            assert all(a.get_tensor(key).equal(b.get_tensor(key)) for key in a.keys())  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize("case", CASES)
def test_skip_goes_on_and_the_rate_follows_applied_steps(ended: Ended, case: str) -> None:
    results, run = ended(case, "skip")
    for result in results:
        assert result["error"] is None
        config, progress = result["config"], result["progress"]
        tokens, trained = tokens_per_step(config), 0
        for step in result["steps"]:
            want = learning_rate(config.schedule, config.optim.lr, trained + tokens, STEPS * tokens)
            assert step["lr"] == want
            trained += tokens * step["applied"]
        rates = [step["lr"] for step in result["steps"]]
        assert rates[1] == rates[2] and rates[3] == rates[4], "the step after a skipped one has the rate of the skipped one"
        assert len(set(rates)) == 3
        assert (progress.step, progress.skipped, progress.skipped_in_row) == (STEPS, 2, 0)
        assert (progress.tokens_seen, progress.tokens_trained) == (STEPS * tokens, (STEPS - 2) * tokens)
    records = read_records(run / "metrics.jsonl")
    assert [(record["step"], record["optim/skipped_steps"]) for record in records] == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [record["data/tokens_seen"] for record in records] == [step * 256 for step in range(1, STEPS + 1)]
    assert sorted(path.name for path in (run / "nonfinite").iterdir()) == ["step_00000002", "step_00000004"]
    assert status(run)["state"] == "finished"
    manifest = Checkpoint(run / "checkpoints" / f"step_{STEPS:08d}").manifest
    assert (manifest.progress["skipped"], manifest.optimizer["step"]) == (2, STEPS - 2)


@pytest.mark.parametrize("case", CASES)
def test_too_many_skips_in_a_row_end_the_run(ended: Ended, case: str) -> None:
    results, run = ended(case, "limit")
    for result in results:
        assert result["error"] == results[0]["error"]
        assert "train.nonfinite_limit=2" in result["error"]
        assert [step["applied"] for step in result["steps"]] == [True, False, False, False]
        assert result["progress"].skipped == 2
    assert status(run)["state"] == "failed"
    assert Checkpoint(run / "checkpoints" / "step_00000003").manifest.optimizer["step"] == 1
