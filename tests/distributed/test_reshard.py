"""Promise: what one layout saved, any other loads: float32 masters and moments bit for bit, the next losses up to the order of
sums. Nine layouts by nine, between one, two and four processes; and what only some heads have, in a ring of four.

Tolerance, float32: as in test_parity, 1e-5 of the loss for each of two steps.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.parallel.engine import PARTS
from tests.distributed.layouts import world
from tests.distributed.pool import run_jobs

GRID = ["one_process", "pp2_1f1b", "pp2_zbv", "tp2_sequence", "dp2_zero0", "dp2_zero3", "pp2_zbv_tp2", "pp2_1f1b_dp2",
        "tp4_shared_keys"]  # fmt: skip
# Each layout saves once and loads once, most between unlike numbers of processes.
FEW = [(saved, GRID[(number + 3) % len(GRID)]) for number, saved in enumerate(GRID)]
RING = ["pp2_1f1b", "tp2_sequence", "dp2_zero3", "pp2_zbv_heads_alone"]
# Vocabulary projections of the depths' own, the discriminator: parameters that the others lack.
KINDS = [(f"{RING[n - 1]}_{kind}", f"{RING[n]}_{kind}") for kind in ("medusa_own", "koala") for n in range(len(RING))]
Loaded = tuple[Path, Path, list[float], list[float]]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Loaded]:
    """saved under, loaded under -> the checkpoint, the same saved again, and the losses after each."""
    folder = tmp_path_factory.mktemp("reshard")
    tokenizer = folder / "tokenizer.json"
    byte_tokenizer().save(str(tokenizer))

    def checkpoint(name: str) -> Path:
        return folder / name / "step_00000002"

    @cache
    def saved(size: int, of_kinds: bool) -> dict[str, list[float]]:
        jobs = []
        names = [before for before, _ in KINDS] if of_kinds else GRID
        for layout in [layout for layout in names if world(layout) == size]:
            arguments = {"layout": layout, "root": str(folder / layout), "tokenizer": str(tokenizer)}
            jobs.append({"name": layout, "task": "save_under", "arguments": arguments})
        return {name: ranks[0] for name, ranks in run_jobs(size, jobs, folder).items()}

    @cache
    def pair(before: str, after: str) -> Loaded:
        losses, name = saved(world(before), before not in GRID)[before], f"{before}-{after}"
        arguments = {"checkpoint": str(checkpoint(before)), "root": str(folder / name), "tokenizer": str(tokenizer)}
        jobs = [{"name": name, "task": "load_under", "arguments": {"layout": after, **arguments}}]
        return checkpoint(before), checkpoint(name), losses, run_jobs(world(after), jobs, folder)[name][0]

    return pair


def require_same(loaded: Loaded) -> None:
    before, after, expected, losses = loaded
    one, other = Checkpoint(before), Checkpoint(after)
    assert one.manifest.parameters.keys() == other.manifest.parameters.keys()
    for name in one.manifest.parameters:
        for part in PARTS:
            values = one.read(name, part)
            assert values.any(), (name, part)
            assert values.equal(other.read(name, part)), (name, part)
    assert one.manifest.optimizer == other.manifest.optimizer
    assert losses == pytest.approx(expected, rel=2e-5)
    assert expected[0] != expected[1], "a loss that never changes proves nothing"


@pytest.mark.parametrize(("before", "after"), FEW)
def test_a_layout_reads_another(moved: Callable[[str, str], Loaded], before: str, after: str) -> None:
    require_same(moved(before, after))


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), KINDS)
def test_a_layout_reads_what_only_some_heads_have(moved: Callable[[str, str], Loaded], before: str, after: str) -> None:
    require_same(moved(before, after))


@pytest.mark.full
@pytest.mark.parametrize("after", GRID)
@pytest.mark.parametrize("before", GRID)
def test_every_layout_reads_every_other(moved: Callable[[str, str], Loaded], before: str, after: str) -> None:
    require_same(moved(before, after))
