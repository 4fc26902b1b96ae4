"""Promise: each experiment is one command that leaves a table, its numbers and a plot; what it measures is what it says; wrong
settings are answered in one line. Sizes are tiny: only choice points can be resolved in seconds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config.folder import groups
from mtp_dist.config.heads import KINDS
from mtp_dist.config.study import EXPERIMENTS, SIZES, settled
from mtp_dist.errors import UserError
from mtp_dist.study import cost, prepare
from tests.studies.tiny import composed

ROOT = Path(__file__).parents[2]


def finished(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    done = finished("-m", "tests.studies.tiny", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def numbers(folder: Path, experiment: str) -> dict[str, list[dict[str, Any]]]:
    content = json.loads((folder / experiment / "results.json").read_text())
    return {variant: [run["numbers"] for run in found] for variant, found in content["variants"].items()}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_leaves_a_table_and_a_plot(tiny: Path, experiment: str) -> None:
    found = numbers(tiny, experiment)
    assert len(found) >= 2
    assert all(len(values) == 2 for values in found.values())
    for values in found.values():
        assert all(number is not None for run in values for number in run.values())
    page = (tiny / experiment / "results.md").read_text()
    for variant in found:
        assert re.search(rf"^\| {re.escape(variant)} \|.* ± ", page, re.MULTILINE)
    assert (tiny / experiment / f"{experiment}.png").read_bytes().startswith(b"\x89PNG")


def test_terms_that_stay_uncertain_are_those_that_the_rule_counts(tiny: Path) -> None:
    """Measured by training: 1/7 for next-token prediction, 6/21 for heads that see nothing between, 3/21 for sequential ones."""
    for variant, share in {"none": 1 / 7, "parallel": 6 / 21, "medusa": 6 / 21, "sequential": 3 / 21}.items():
        for run in numbers(tiny, "choice_points")[variant]:
            assert run["hard"] == pytest.approx(share)
            assert run["uncertain"] == pytest.approx(share)


def test_what_is_learned_leaves_the_gradient_to_the_hard_terms(tiny: Path) -> None:
    found = numbers(tiny, "choice_points")
    for variant, runs in found.items():
        for run in runs:
            assert 0.05 < run["gradient_begin"] < run["gradient_end"] < 1, variant
    for blind in ("parallel", "medusa"):
        assert found[blind][0]["gradient_begin"] > found["none"][0]["gradient_begin"]


def test_equal_parameters_are_equal(tiny: Path) -> None:
    found = numbers(tiny, "heads")
    assert set(found) == {"none_matched", "sequential_matched", "parallel_matched"}
    assert all(abs(run["parameters"] - 0.3) < 0.01 * 0.3 for values in found.values() for run in values)
    drafting = set(found["sequential_matched"][0]) - set(found["none_matched"][0])
    assert {"accepted_1", "accepted_2", "accepted_3", "kept_1", "forward_tokens", "speedup", "same"} <= drafting
    for run in found["sequential_matched"] + found["parallel_matched"]:
        assert run["same"] == 1 <= run["forward_tokens"]
        assert 0 <= run["kept_1"] <= 1
    assert found["none_matched"][0]["gain"] == 1 <= found["sequential_matched"][0]["gain"]


def test_what_heads_read_in_training_is_all_that_differs(tiny: Path) -> None:
    """Another loss where they read their own predictions; other parameters where they have matrices of their own."""
    found = numbers(tiny, "chaining")
    for true, sampled, own in zip(*(found[name] for name in ("true_tokens", "sampled_always", "own_matrices")), strict=True):
        assert true["parameters"] == sampled["parameters"] < own["parameters"]
        assert len({true["loss"], sampled["loss"], own["loss"]}) == 3
        assert true["same"] == sampled["same"] == own["same"] == 1


def test_bytes_are_one_byte_a_token(tiny: Path) -> None:
    found = numbers(tiny, "schedules")
    run = found["bytes_none"][0]
    assert run["gain_bytes"] == pytest.approx(1, abs=0.02)
    assert run["bits"] == pytest.approx(run["loss"] / 0.6931472, rel=0.02)
    assert found["none"][0]["gain_bytes"] > 1.2


def test_one_command_runs_goes_on_and_reports(tmp_path: Path) -> None:
    command = [
        "-m", "mtp_dist.study", "experiment=choice_points", "seeds=[1]", "only=[none]", "train.steps=3", "choice_points.rows=2",
        "schedule.warmup_tokens=0", f"run_dir={tmp_path}",
    ]  # fmt: skip
    for said in ("run 1 of 1: none, seed 1: ", "run 1 of 1: none, seed 1: there already"):
        done = finished(*command)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    assert "| none | 7 | 0.143 |" in (tmp_path / "results.md").read_text()


def test_every_size_is_valid() -> None:
    assert set(groups()["study"]) == {f"{name}_{size}" for name in EXPERIMENTS for size in SIZES}
    for name in EXPERIMENTS:
        for size in SIZES:
            variants = prepare(composed([f"experiment={name}", f"size={size}"]))
            assert all(config.check_only == (size == "paper") for config in variants.values())
            assert all(len(config.seeds) >= 3 for config in variants.values())
            assert next(iter(variants)) in cost(variants)


def test_heads_are_compared_on_equal_terms() -> None:
    """Each variant has the same trunk and tokens, or (matched) the same tokens and parameters."""
    variants = prepare(composed(["experiment=heads"]))
    compared = {config.mtp.kind for config in variants.values()}
    assert {"none", "sequential", "parallel", "medusa", "notebook", "eagle", "eagle3"} <= compared <= set(KINDS)
    assert len({(config.train.steps, config.train.global_batch, config.model.layers) for config in variants.values()}) == 1
    assert {name.endswith("_matched") for name, config in variants.items() if config.parameters is not None} == {True}


def test_choice_points_count_single_tokens() -> None:
    config = composed(["experiment=choice_points"])
    config.mtp.kind, config.mtp.depth = "top", 1
    with pytest.raises(UserError, match=r"mtp\.kind=top ranks tokens"):
        settled(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "experiment="),
        (["experiment=path_stars"], "did you mean path_star?"),
        (["experiment=path_star", "size=huge"], "size=huge is not one of laptop or paper"),
        (["experiment=path_star", "only=[nobody]"], "only=nobody"),
        (["experiment=path_star", "seeds=[1,1]"], "seeds="),
        (["experiment=path_star", "path_star.nodes=4"], "path_star.nodes=4"),
        (["experiment=choice_points", "choice_points.choice=7"], "choice_points.choice=7"),
        (["experiment=choice_points", "mtp.stride=2"], "mtp.stride=2 leaps over tokens"),
        (["experiment=heads", "mtp.stride=2"], "mtp.stride=2 leaps over tokens"),
        (["experiment=heads", "text.prompts=0"], "text.prompts=0"),
        (["experiment=schedules", "text.prompts=3"], "text.prompts=3 has no effect with experiment=schedules"),
        (["experiment=induction", "path_star.degree=3"], "path_star.degree=3 has no effect with experiment=induction"),
        (["experiment=heads", "validation.prompt=x"], "validation.prompt=x has no effect with experiment=heads"),
        (["experiment=induction", "induction.mentions=40"], "induction.mentions=40"),
        (["experiment=polynomials", "polynomials.modulus=8"], "polynomials.modulus=8 is not a prime"),
        (["experiment=choice_points", "parallel.data=2"], "one process"),
        (["experiment=choice_points", "parameters=10"], "parameters=10"),
        (["experiment=choice_points", "run_dir="], "run_dir"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_are_named(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        prepare(composed(settings))
