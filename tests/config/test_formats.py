"""Promise: what Slurm, torchrun or wandb would refuse or lose later is refused at the start, in one line with the way out."""

import shutil
from pathlib import Path

import pytest

from mtp_dist.config import conf_files
from mtp_dist.config.compose import compose, settings
from mtp_dist.config.folder import conf_folder
from mtp_dist.config.launch_validation import (
    WANDB_FORBIDDEN,
    WANDB_PROJECT,
    WANDB_TAG,
    time_limit,
    validate_formats,
    validate_tracker,
)
from mtp_dist.config.schema import LaunchConfig, TrackerConfig, TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.quantity import counted


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400),
        ("1-00:00:30", 86430), ("UNLIMITED", float("inf")), ("infinite", float("inf")),
    ],
)  # fmt: skip
def test_time_limits_are_those_of_sbatch(text: str, seconds: float) -> None:
    assert time_limit(text) == seconds


@pytest.mark.parametrize("text", ["banana", "", "1:99:00", "1:2:3:4", "1h", "-1", "1.5", "24:00:00 ", "1-2-3", "9" * 5000, "٣"])
def test_what_is_no_time_limit(text: str) -> None:
    assert time_limit(text) is None
    with pytest.raises(UserError, match="is not a time limit Slurm accepts; write hours:minutes:seconds"):
        validate_formats(LaunchConfig(time=text))


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (LaunchConfig(mem="lots"), ["launch.mem=lots", "64G"]),
        (LaunchConfig(mem="1.5G"), ["launch.mem=1.5G"]),
        (LaunchConfig(mem="64 GB"), ["launch.mem=64 GB"]),
        (LaunchConfig(mem=""), ["launch.mem="]),
        (LaunchConfig(time="0"), ["launch.time=0", "longer"]),
        (LaunchConfig(time="1", signal_seconds=60), ["launch.signal_seconds=60", "launch.time=1"]),
        (LaunchConfig(partition="a b"), ["launch.partition='a b'"]),
        (LaunchConfig(account=""), ["launch.account=''"]),
        (LaunchConfig(qos="x;rm"), ["launch.qos='x;rm'"]),
        (LaunchConfig(job_name="a\nb"), ["launch.job_name"]),
        (LaunchConfig(job_name=" "), ["launch.job_name"]),
        (LaunchConfig(master_addr="my host"), ["launch.master_addr='my host'", "10.0.0.1"]),
        (LaunchConfig(master_addr=""), ["launch.master_addr=''"]),
        (LaunchConfig(directives=["exclusive"]), ["'exclusive'", "--option=value"]),
        (LaunchConfig(directives=["--exclusive\n--x"]), ["sbatch option"]),
        (LaunchConfig(directives=["--time=3"]), ["--time=3", "launch.time"]),
        (LaunchConfig(directives=["-N 4"]), ["-N 4", "launch.nodes"]),
        (LaunchConfig(directives=["-N4"]), ["-N4", "launch.nodes"]),
        (LaunchConfig(directives=["--array=1-3"]), ["--array=1-3", "run folder"]),
        (LaunchConfig(setup=["a\0b"]), ["launch.setup", "zero byte"]),
    ],
)
def test_what_slurm_or_torchrun_would_refuse(launch: LaunchConfig, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        validate_formats(launch)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_they_take() -> None:
    validate_formats(LaunchConfig(mem="0", time="3-0", partition="gpu,debug", account="a.b", qos="high", job_name="a run"))
    validate_formats(LaunchConfig(mem="64g", master_addr="fe80::1%eth0", setup=["module load x", ""]))
    validate_formats(LaunchConfig(directives=["--exclusive", "--constraint=a100&ib", "-x node1", "--mail-user=a@b.c"]))


@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        (TrackerConfig(wandb="on"), ["tracker.wandb=on", "offline"]),
        (TrackerConfig(project="a/b"), ["tracker.project=a/b", "holds /"]),
        (TrackerConfig(project="x" * 129), ["129 characters", "128"]),
        (TrackerConfig(project=""), ["tracker.project is empty"]),
        (TrackerConfig(project="a\nb"), ["tracker.project"]),
        (TrackerConfig(entity="a/b"), ["tracker.entity=a/b"]),
        (TrackerConfig(entity=""), ["tracker.entity is empty"]),
        (TrackerConfig(name="n" * 200), ["tracker.name has 200"]),
        (TrackerConfig(name="\udcff"), ["tracker.name"]),
        (TrackerConfig(tags=[""]), ["tracker.tags", "0 characters"]),
        (TrackerConfig(tags=["t" * 65]), ["65 characters", "1 to 64"]),
        (TrackerConfig(tags=["a", "a"]), ["twice"]),
        (TrackerConfig(tags=["\ud800"]), ["tracker.tags"]),
    ],
)
def test_what_wandb_would_refuse(tracker: TrackerConfig, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        validate_tracker(tracker)
    for word in words:
        assert word in str(caught.value)


def test_the_limits_are_those_of_wandb_itself() -> None:
    """They repeat wandb's own; this fails when a new wandb changes them."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    wandb.Settings(project="p" * WANDB_PROJECT, run_tags=["t" * WANDB_TAG, "é, ß"])
    for wrong in ({"project": "p" * (WANDB_PROJECT + 1)}, {"run_tags": ["t" * (WANDB_TAG + 1)]}, {"run_tags": [""]},
                  *({"project": f"a{letter}b"} for letter in WANDB_FORBIDDEN)):  # fmt: skip
        with pytest.raises(Exception, match=r"exceeded|cannot contain|characters"):
            wandb.Settings(**wrong)


LAUGHS = "a: &a [x, x]\n" + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAUGHS, ["line 3", "*a is a YAML alias"]),
        ("train: {compile: 7}\n", ["train.compile=7", "true or false"]),
        ("train: " + "{a: " * 60 + "1" + "}" * 60 + "\n", ["nested deeper than 50"]),
        ("train: [\n", ["not valid YAML"]),
        ("- 1\n", ["does not hold settings"]),
        ("# " + "x" * 2**20 + "\n", ["more than 1048576 bytes"]),
        ("train: {steps: " + "9" * 5000 + "}\n", [""]),
    ],
)
def test_an_experiment_file_that_cannot_be_composed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: list[str]
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(conf_folder(), conf)
    (conf / "experiment" / "mine.yaml").write_text("# @package _global_\n" + content)
    monkeypatch.setattr(conf_files, "conf_folder", lambda: conf)
    with pytest.raises(UserError) as caught:
        conf_files.check("train", {"experiment": "mine"}, settings(TrainingRun))
    for word in ["mine.yaml", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_has_no_anchors() -> None:
    with pytest.raises(UserError, match="list of list of number"):
        compose("train", TrainingRun, ["mtp.curriculum=[&a [0,1], *a]"])


def test_counts_agree_with_their_nouns() -> None:
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert counted(1, "entry", "entries") == "1 entry"
    assert counted(2, "entry", "entries") == "2 entries"
    assert counted(1234567, "token", commas=True) == "1,234,567 tokens"
    assert counted(4.0, "second") == "4 seconds"
