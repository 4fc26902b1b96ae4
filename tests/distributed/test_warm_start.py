"""Promise: a new run starts from another's true float32 weights, under any layout and with any number of heads; what does not
fit is refused in one line before any process starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint.compatibility import require_start
from mtp_dist.checkpoint.manifest import FORMAT, WITH_OWN_MATRICES
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.heads import modules
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.freezing import check, freeze
from mtp_dist.model.parameter import initial_value, spec_of
from mtp_dist.parallel.engine import MOMENTS, PARTS
from mtp_dist.tracking.jsonl import read_records
from tests.distributed.layouts import configuration
from tests.distributed.pool import run_jobs
from tests.distributed.ranks import settings

SEED = 7
BF16 = {"train.dtype": "bfloat16", "checkpoint.keep_last": 0}
# run: layout, D, settings of init., heads kept
STARTS: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "more": ("dp2_zero1", 3, {}, 2),
    "fewer": ("pp2_zbv", 1, {"init.optimizer": True}, 1),
    "none": ("tp2", 0, {}, 0),
    "fresh": ("pp2_1f1b", 2, {"init.heads": "fresh", "init.optimizer": True}, 0),
    "copies": ("tp2_sequence_medusa_own", 2, {"init.heads": "fresh"}, 0),
    "own matrices": ("pp2_1f1b_tied_own_matrices", 2, {"init.heads": "fresh"}, 0),
    # Other kinds on the same trunk, jointly and alone.
    "parallel": ("pp2_1f1b_parallel", 2, {"init.heads": "fresh"}, 0),
    "medusa alone": ("pp2_1f1b_frozen_medusa", 2, {"init.heads": "fresh"}, 0),
    "notebook": ("pp2_zbv_notebook", 3, {"init.heads": "fresh", "init.optimizer": True}, 0),
    "notebook alone": ("tp2_frozen_notebook", 2, {"init.heads": "fresh"}, 0),
    "eagle": ("dp2_eagle", 2, {"init.heads": "fresh"}, 0),
    "eagle alone": ("pp2_1f1b_frozen_eagle", 2, {"init.heads": "fresh"}, 0),
    "eagle3": ("pp2_zbv_eagle3", 3, {"init.heads": "fresh"}, 0),
    "leaps": ("dp2_stride", 2, {"init.heads": "fresh"}, 0),
    "sequential alone": ("pp2_zbv_frozen", 2, {}, 2),
    "koala alone": ("pp2_zbv_frozen_koala", 2, {"init.heads": "fresh"}, 0),
    "discriminator": ("tp2_adversary", 2, {"init.optimizer": True}, 2),
    "all": ("tp2", 2, {"init.optimizer": True}, 2),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """Folder of the run "old", with D = 2 and its checkpoint of step 4, and of the runs that start from it."""
    folder = tmp_path_factory.mktemp("warm")
    base = {"data": str(tiny_dataset)}
    old = {"layout": "pp2_1f1b", "run_dir": str(folder / "old"), "steps": 4, "stops": [], "overrides": BF16}
    jobs = [{"name": "old", "task": "train", "arguments": base | old}]
    for name, (layout, depth, init, _) in STARTS.items():
        overrides = {**BF16, **init, "init.checkpoint": str(folder / "old")}
        arguments = base | {"layout": layout, "run_dir": str(folder / name), "depth": depth, "seed": SEED, "overrides": overrides}
        jobs.append({"name": name, "task": "start_from", "arguments": arguments})
    run_jobs(2, jobs, folder)
    return folder


def at(made: Path, run: str, step: int) -> Checkpoint:
    return Checkpoint(made / run / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize("run", STARTS)
def test_what_is_taken_has_the_same_bits_and_the_rest_is_fresh(made: Path, run: str) -> None:
    _, depth, init, kept = STARTS[run]
    old, new = at(made, "old", 4), at(made, run, 0)
    specs = {name: spec_of(p) for name, p in new.load_model().named_parameters()}
    count = modules(replace(configuration(STARTS[run][0]).mtp, depth=depth))
    assert {int(name.split(".")[1]) for name in specs if name.startswith("mtp.")} == set(range(1, count + 1))
    optimizer, whole = init.get("init.optimizer", False), kept == depth == 2
    for name, spec in specs.items():
        head, adversary = name.startswith("mtp."), name.startswith("adversary.")
        taken = int(name.split(".")[1]) <= kept if head else not adversary
        source = name if taken else spec.stands_for
        expected = old.read(source, "master") if source else initial_value(name, spec, SEED)
        assert new.read(name, "master").equal(expected), name
        if source and spec.std is not None:
            assert not expected.equal(expected.bfloat16().float()), "weights that bfloat16 can hold would prove nothing"
        for part in MOMENTS:
            if optimizer and taken and (whole or not head):
                assert new.read(name, part).equal(old.read(name, part)), (name, part)
            else:
                assert not new.read(name, part).any(), (name, part)
    heads = 4 if optimizer and whole else 0
    assert new.manifest.optimizer["steps"] == {"trunk": 4 if optimizer else 0, "heads": heads}


@pytest.mark.parametrize("run", STARTS)
def test_it_trains_from_there_as_a_run_of_its_own(made: Path, run: str) -> None:
    records = read_records(made / run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["data/tokens_seen"] == 16 * 16
    before, after = at(made, run, 0), at(made, run, 2)
    moved = {name for name in before.manifest.parameters if not before.read(name, PARTS[0]).equal(after.read(name, PARTS[0]))}
    alone = configuration(STARTS[run][0]).mtp.freeze_trunk
    assert any(name.startswith("mtp.") for name in moved) == (STARTS[run][1] > 0)
    assert any(not name.startswith(("mtp.", "adversary.")) for name in moved) == (not alone)
    assert any(name.startswith("adversary.") for name in moved) == (configuration(STARTS[run][0]).mtp.adversarial > 0)
    assert before.manifest.tracker != at(made, "old", 4).manifest.tracker


def test_matrices_of_the_heads_own_are_a_format_that_earlier_versions_refuse(made: Path) -> None:
    """They would use the trunk's in their place. Medusa's they know."""
    assert at(made, "own matrices", 0).manifest.format == WITH_OWN_MATRICES
    assert {at(made, run, 0).manifest.format for run in ("more", "copies", "notebook")} == {FORMAT}


def asked(made: Path, data: Path, **overrides: Any) -> TrainingRun:
    config = settings("one_process", data, made / "asked", 2, init__checkpoint=str(made / "old"))
    for key, value in overrides.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"model__mlp": 64}, "belongs to a different model: its model.mlp is 48, this run's is 64; set model.mlp=48"),
        ({"mtp__kind": "parallel"}, "has heads of mtp.kind=sequential, this run's are parallel; set mtp.kind=sequential, or"),
        ({"mtp__stride": 2}, "has heads of mtp.stride=1, this run's are 2; set mtp.stride=1, or init.heads=fresh"),
        ({"mtp__embedding": "own"}, "has heads of mtp.embedding=shared, this run's are own; set mtp.embedding=shared, or init"),
        ({"mtp__projection": "own"}, "has heads of mtp.projection=shared, this run's are own; set mtp.projection=shared, or"),
        ({"mtp__concat": "hidden_first"}, "has heads of mtp.concat=embedding_first, this run's are hidden_first; set mtp"),
        ({"init__checkpoint": "/nowhere"}, "init.checkpoint=/nowhere does not exist"),
        ({"init__heads": "old"}, "init.heads=old is not one of keep or fresh"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(
    made: Path, tiny_dataset: Path, overrides: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as refused:
        check(asked(made, tiny_dataset, **overrides))
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_other_heads_are_no_hindrance_to_fresh_ones(made: Path, tiny_dataset: Path) -> None:
    config = asked(made, tiny_dataset, mtp__concat="hidden_first", mtp__kind="notebook", mtp__stride=2, init__heads="fresh")
    require_start(at(made, "old", 4).path, config)


def test_every_start_means_the_same_checkpoint(made: Path, tiny_dataset: Path) -> None:
    """The other run may go on meanwhile, or be gone."""
    full = check(asked(made, tiny_dataset))
    assert full.init.checkpoint == str(at(made, "old", 4).path.resolve())
    freeze(full)
    assert check(asked(made, tiny_dataset)).init.checkpoint == full.init.checkpoint
    with pytest.raises(UserError, match=r"init\.checkpoint="):
        freeze(check(asked(made, tiny_dataset, init__checkpoint=str(made / "more"))))
