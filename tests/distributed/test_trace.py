"""Promise: a recorded step of a real run tells every pass of every micro-batch once, in an order that can have happened, and
recording changes no bit of the training."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config.layout import chunks, is_v, micro_batches, rank_of_chunk
from mtp_dist.tracking import names
from mtp_dist.tracking.jsonl import read_records
from tests.distributed.layouts import configuration
from tests.distributed.pool import run_jobs

LAYOUTS = ("pp2_zbv", "pp2_1f1b", "pp2_dualpipev", "dp2_zero1", "dp2_zero2", "dp2_zero3", "pp2_zbv_frozen", "pp2_1f1b_frozen")
STEPS, TRACED = 4, 3
DETERMINED = (names.LOSS_TOTAL, names.LOSS_MAIN, names.of_depth(names.LOSS_DEPTH, 2), names.GRADIENT_NORM)
Runs = Callable[[str, bool], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Runs:
    """(layout, traced) -> run folder."""
    folder = tmp_path_factory.mktemp("trace")

    def place(layout: str, traced: bool) -> Path:
        return folder / f"{layout}-{'traced' if traced else 'plain'}"

    jobs = []
    for layout in LAYOUTS:
        for traced in (True, False):
            where = place(layout, traced)
            arguments: dict[str, Any] = {"layout": layout, "data": str(tiny_dataset), "run_dir": str(where), "steps": STEPS}
            overrides = {"train.trace": traced, "train.log_every_steps": 2}
            jobs.append({"name": where.name, "task": "train", "arguments": arguments | {"stops": [], "overrides": overrides}})
    run_jobs(2, jobs, folder)
    return place


def spans_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    """rank -> its spans by time."""
    events = json.loads((run / "trace" / f"step_{TRACED}.json").read_text())["traceEvents"]
    found: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for event in sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"]):
        found[event["tid"]].append(event)
    return found


def key(event: dict[str, Any]) -> tuple[str, int, int]:
    return event["cat"], event["args"]["chunk"], event["args"]["micro_batch"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_micro_batch_passes_every_chunk_once(runs: Runs, layout: str) -> None:
    config = configuration(layout)
    for rank, spans in spans_of(runs(layout, True)).items():
        counts = Counter(key(event) for event in spans if event["cat"] in "FBW")
        own = [c for c in range(chunks(config.parallel)) if rank_of_chunk(config.parallel, c) == rank] if "pp2" in layout else [0]
        passes = [(c, m) for c in own for m in range(micro_batches(config))]
        frozen, last = config.mtp.freeze_trunk, chunks(config.parallel) - 1
        backward = [(c, m) for c, m in passes if not frozen or c == last]
        assert {counts[place] for place in [("F", *part) for part in passes] + [("B", *part) for part in backward]} == {1}
        weights = {(c, m) for kind, c, m in counts if kind == "W"}
        if layout == "pp2_zbv":
            assert weights == set(passes)
        elif not is_v(config.parallel) or "dp2" in layout or frozen:
            assert not weights
        assert weights <= set(passes)
        assert sum(counts.values()) == len(passes) + len(backward) + len(weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spans_of_a_rank_follow_each_other(runs: Runs, layout: str) -> None:
    for spans in spans_of(runs(layout, True)).values():
        kinds = Counter(event["cat"] for event in spans)
        assert (kinds["exchange"], kinds["reduce"], kinds["optimizer"]) == (1, 1, 1)
        for before, after in pairwise(spans):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-3


@pytest.mark.parametrize("layout", ["pp2_zbv", "pp2_1f1b", "pp2_dualpipev"])
def test_clocks_of_ranks_agree(runs: Runs, layout: str) -> None:
    """A pass begins when the one that it depends on has ended, on whatever rank that was: one clock tells both."""
    last = chunks(configuration(layout).parallel) - 1
    events = {key(e): e for spans in spans_of(runs(layout, True)).values() for e in spans if e["cat"] in "FBW"}

    def follows(later: tuple[str, int, int], earlier: tuple[str, int, int]) -> bool:
        return events[earlier]["ts"] + events[earlier]["dur"] <= events[later]["ts"] + 1e-3

    for kind, c, m in events:
        if kind == "F" and c > 0:
            assert follows((kind, c, m), ("F", c - 1, m))
        if kind == "B":
            assert follows((kind, c, m), ("F" if c == last else "B", min(c + 1, last), m))
        if kind == "W":
            assert follows((kind, c, m), ("B", c, m))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bubble_is_tracked_with_its_step(runs: Runs, layout: str) -> None:
    run = runs(layout, True)
    bubble = json.loads((run / "trace" / f"step_{TRACED}.json").read_text())["otherData"]["bubble"]
    tracked = {record["step"]: record[names.PIPELINE_BUBBLE] for record in read_records(run / "metrics.jsonl")
               if names.PIPELINE_BUBBLE in record}
    assert tracked == {TRACED: bubble["mean"]}
    assert all(0 <= share < 1 for share in bubble["ranks"].values())
    assert (run / "trace" / f"step_{TRACED}.png").stat().st_size > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recording_changes_no_bit(runs: Runs, layout: str) -> None:
    """Step 4 follows the recorded one: its loss and norm hold what that step did to the weights."""
    told = [
        [tuple(record[name] for name in DETERMINED) for record in read_records(runs(layout, traced) / "metrics.jsonl")
         if record["step"] % 2 == 0]
        for traced in (True, False)
    ]
    assert len(told[0]) == STEPS // 2
    assert told[0] == told[1]
    assert not (runs(layout, False) / "trace").exists()
