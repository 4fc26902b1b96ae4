"""Promise: a run may be killed at any instant, on any rank, and is the run that was never killed: the same losses, each step
once, each row once, the same final checkpoint; no start is ever left without a sound checkpoint to go on from.

Ranks are real processes, killed by SIGKILL: at the places of ``checkpoint.fault``, in each phase of a save, and at random
instants.
"""

import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.fault import POINTS, VARIABLE
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.stream import Stream
from mtp_dist.exit_codes import LOST_PEER
from mtp_dist.tracking.jsonl import read_records
from tests.distributed.layouts import world
from tests.distributed.ranks import Ranks, freeze, output, rows_trained, settings

EXACT = ("loss/total", "loss/main", "loss/depth_1", "loss/depth_2", "optim/gradient_norm", "optim/lr", "data/tokens_seen")
STEPS = 8
KILLED = -signal.SIGKILL


@pytest.fixture(scope="session")
def unkilled(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Callable[[str, int], tuple[Path, float]]:
    """layout, steps -> a run that nobody killed, and the seconds from its first step to its end."""

    @cache
    def of(layout: str, steps: int) -> tuple[Path, float]:
        run = freeze(settings(layout, tiny_dataset, tmp_path_factory.mktemp("unkilled") / layout, steps))
        ranks = Ranks(run)
        wait_for_step(run, 1, ranks)
        began = time.monotonic()
        assert ranks.wait() == [0] * world(layout), output(run)
        return run, time.monotonic() - began

    return of


def wait_for_step(run: Path, step: int, ranks: Ranks) -> None:
    while not any(record["step"] >= step for record in read_records(run / "metrics.jsonl")):
        if not any(process.is_alive() for process in ranks.processes):
            return
        time.sleep(0.01)


def start_and_die_at(run: Path, point: str, rank: int, time_: int = 1) -> None:
    """One start that is killed at a place; some save at the first of them, others only when there is something to prune."""
    ranks = Ranks(run, {VARIABLE: f"{point}:{rank}:{time_}"})
    codes = ranks.wait()
    assert codes[rank] == KILLED, (point, codes, output(run))
    others = codes[:rank] + codes[rank + 1 :]
    assert others == [LOST_PEER] * len(others), f"{point}: the other ranks end, and know why: {codes}"
    assert "Traceback" not in output(run)
    look(run)


def start_and_die_after(run: Path, rank: int, seconds: float) -> None:
    """One start in which a rank is killed so many seconds after the start's first step; it may have ended before."""
    steps = [record["step"] for record in read_records(run / "metrics.jsonl")]
    ranks = Ranks(run)
    wait_for_step(run, (steps[-1] if steps else 0) + 1, ranks)
    time.sleep(seconds)
    ranks.kill(rank)
    codes = ranks.wait()
    assert -signal.SIGALRM not in codes, f"the other ranks hung: {codes}"
    look(run)


def look(run: Path) -> None:
    """What a killed start leaves: every checkpoint that has its name is sound."""
    for path in folder.complete(run / "checkpoints"):
        assert Checkpoint(path).damages() == [], path


def require_same(run: Path, whole: Path, layout: str, data: Path, steps: int) -> None:
    killed, unbroken = (read_records(path / "metrics.jsonl") for path in (run, whole))
    assert [record["step"] for record in killed] == list(range(1, steps + 1)), "each step once"
    for one, other in zip(killed, unbroken, strict=True):
        assert {name: one[name] for name in EXACT} == {name: other[name] for name in EXACT}
    assert len({record["loss/main"] for record in killed}) == steps, "a loss that never changes proves nothing"
    assert rows_trained(run) == expected_rows(layout, data, steps), "each row once, in its step"
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", *(folder.name_of(step) for step in (steps - 1, steps))], "leftovers are removed"
    for path in sorted((whole / "checkpoints" / folder.name_of(steps)).glob("rank_*")):
        ours = load_file(run / "checkpoints" / folder.name_of(steps) / path.name)
        for key, value in load_file(path).items():
            assert value.equal(ours[key]), (path.name, key)


def expected_rows(layout: str, data: Path, steps: int) -> dict[int, dict[int, list[Any]]]:
    """The rows of each step, read here straight from the shards."""
    config = settings(layout, data, Path("unused"), steps)
    replicas = config.parallel.data
    streams = [
        Stream(
            Dataset.open(data), "train",
            rows=config.train.global_batch, sequence_length=config.train.sequence_length, ahead=config.mtp.depth,
            lanes=config.data.lanes, block_samples=config.data.block_samples, mix_tokens=config.data.mix_tokens, seed=config.seed,
            replica=replica, replicas=replicas,
        )
        for replica in range(replicas)
    ]  # fmt: skip
    found: dict[int, dict[int, list[Any]]] = {}
    for step in range(1, steps + 1):
        for replica, stream in enumerate(streams):
            batch = stream.next()[0]
            found.setdefault(step, {})[replica] = [batch.tokens.tolist(), batch.samples]
    return found


def finish(run: Path, layout: str) -> None:
    assert Ranks(run).wait() == [0] * world(layout), output(run)


def test_killed_in_the_phases_of_a_save_and_in_training(unkilled: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    """One run, killed once in each kind of phase, then at a random instant."""
    layout = "pp2_zbv"
    whole, seconds = unkilled(layout, STEPS)
    run = freeze(settings(layout, tiny_dataset, tmp_path / "run", STEPS))
    for point, rank in (("write.middle", 1), ("manifest.before", 0), ("rename.after", 0), ("snapshot.middle", 0)):
        start_and_die_at(run, point, rank)
    start_and_die_at(run, "prune.middle", 0)
    start_and_die_after(run, random.Random(5).randrange(2), random.Random(6).uniform(0, seconds / STEPS))
    finish(run, layout)
    require_same(run, whole, layout, tiny_dataset, STEPS)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["pp2_1f1b", "dp2_zero1"])
def test_killed_at_every_place_of_a_save(unkilled: Any, tiny_dataset: Path, tmp_path: Path, layout: str) -> None:
    steps = 24
    whole, _ = unkilled(layout, steps)
    run = freeze(settings(layout, tiny_dataset, tmp_path / "run", steps))
    for number, point in enumerate(POINTS):
        shared = point.startswith(("snapshot", "write"))
        start_and_die_at(run, point, number % 2 if shared else 0, 2 if shared else 1)
    finish(run, layout)
    require_same(run, whole, layout, tiny_dataset, steps)


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("layout", ["pp2_zbv", "tp2", "pp2_zbv_dp2", "tp2_dp2"])
def test_killed_at_random_instants(unkilled: Any, tiny_dataset: Path, tmp_path: Path, layout: str) -> None:
    """Sixteen kills of random ranks; a start that comes to its end before its kill is one more that ended well."""
    steps, source = 60, random.Random(layout)
    whole, seconds = unkilled(layout, steps)
    run = freeze(settings(layout, tiny_dataset, tmp_path / "run", steps))
    for _ in range(16):
        start_and_die_after(run, source.randrange(world(layout)), source.uniform(0, seconds / 16))
    finish(run, layout)
    require_same(run, whole, layout, tiny_dataset, steps)
