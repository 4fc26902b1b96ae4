"""Promises: the batch script is a pure function of the settings, and no value can break out of it, in the shell or in Slurm's own
parser of #SBATCH lines. The expected scripts in golden/ are rewritten by running this file with MTP_DIST_GOLDEN=write."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.slurm import TEMPLATE, render
from mtp_dist.config.compose import compose
from mtp_dist.config.schema import LaunchConfig, ParallelConfig, TrainingRun
from mtp_dist.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
AWKWARD = "a \"b\" 'c' $(touch x) `d` \\ #e; f & *"

CASES = {
    "plain": TrainingRun(
        run_dir="/shared/runs/plain", parallel=ParallelConfig(pipeline=2, data=2), launch=LaunchConfig(nodes=2, device="cpu")
    ),
    "full": TrainingRun(
        run_dir="/shared/my runs/100%'s",
        parallel=ParallelConfig(pipeline=2, tensor=4, data=2),
        launch=LaunchConfig(
            nodes=2,
            partition=AWKWARD,
            account="lab-7",
            qos="high",
            time="2-00:00:00",
            gpus_per_node=8,
            cpus_per_task=12,
            mem="900G",
            job_name="it's \"big\"",
            signal_seconds=600,
            requeue=False,
            max_restarts=3,
            master_port=29500,
            directives=["--constraint=h100", "--exclusive"],
            setup=["module load cuda", "export NCCL_DEBUG=WARN"],
        ),
    ),
}


def rendered(config: TrainingRun) -> str:
    return render(config, TEMPLATE.read_text(encoding="utf-8"), "/shared/venv/bin/python", "/shared/code", "/shared/work")


def shell(script: str) -> str:
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", CASES)
def test_script_is_the_expected_one(name: str) -> None:
    path = GOLDEN / f"{name}.sbatch"
    text = rendered(CASES[name])
    if os.environ.get("MTP_DIST_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_script_is_valid_shell(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(rendered(CASES[name]), encoding="utf-8")
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_choice_of_slurm_asks_for_a_notice_and_a_requeue() -> None:
    lines = rendered(compose("train", TrainingRun, ["run_dir=/runs/a", "launch=slurm"])).splitlines()
    assert {"#SBATCH --time=24:00:00", "#SBATCH --signal=B:USR1@300", "#SBATCH --requeue"} < set(lines)
    assert "max_restarts=50" in lines


def test_directives_stand_before_the_first_command() -> None:
    """Slurm stops reading directives at the first line that is neither empty nor a comment."""
    lines = rendered(CASES["full"]).splitlines()
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    found = [index for index, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(found) == 17
    assert max(found) < first_command


FOLDER_NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1)


@settings(max_examples=40, deadline=None)
@given(name=FOLDER_NAMES)
def test_any_folder_name_reaches_the_shell_unchanged(name: str) -> None:
    config = TrainingRun(run_dir=f"/runs/{name}", launch=LaunchConfig(partition=name))
    text = rendered(config)
    assignments = [line for line in text.split("\n") if line.startswith("run_dir=")]
    assert len(assignments) == 1
    assert shell(f"{assignments[0]}\nprintf %s \"$run_dir\"") == config.run_dir


@pytest.mark.parametrize("field", ["partition", "account", "qos", "time", "mem", "job_name"])
def test_a_line_break_cannot_add_a_line(field: str) -> None:
    config = TrainingRun(run_dir="/runs/a", launch=LaunchConfig(**{field: "x\n#SBATCH --uid=0"}))
    with pytest.raises(UserError, match="control character"):
        rendered(config)


def test_run_dir_with_a_line_break_is_refused() -> None:
    with pytest.raises(UserError, match=r"run_dir=.* control character"):
        rendered(TrainingRun(run_dir="/runs/a\nb"))


@pytest.mark.parametrize("directive", ["constraint=h100", "--a\n--b", "", "; rm x"])
def test_a_directive_is_an_option(directive: str) -> None:
    with pytest.raises(UserError, match=r"launch\.directives: .* is not an sbatch option"):
        rendered(TrainingRun(run_dir="/runs/a", launch=LaunchConfig(directives=[directive])))
