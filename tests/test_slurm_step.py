"""Promise: srun alone, without torchrun, gives each task its place, on one node or several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_dist.config.schema import LaunchConfig
from mtp_dist.errors import UserError
from mtp_dist.slurm_step import adopt, torch_variables

# Of a step of 2 nodes with 2 tasks each, as Slurm sets them.
TASK = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07,12]",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4711",
}


def test_a_task_gets_its_place() -> None:
    found = torch_variables(TASK, "10.0.0.7", 29500)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    assert found == expected


@pytest.mark.parametrize(("visible", "local"), [("0,1", "1"), ("1", "0"), ("GPU-8f2a", "0"), ("", "1")])
def test_a_task_that_sees_one_gpu_takes_that_one(visible: str, local: str) -> None:
    assert torch_variables(TASK | {"CUDA_VISIBLE_DEVICES": visible}, "a", 1)["LOCAL_RANK"] == local


def test_every_task_of_a_step_draws_one_port_and_another_step_another() -> None:
    def port(**others: str) -> int:
        return int(torch_variables(TASK | others, "a", 0)["MASTER_PORT"])

    assert port(SLURM_PROCID="0", SLURM_LOCALID="0") == port()
    assert len({port(), port(SLURM_STEP_ID="1"), port(SLURM_RESTART_COUNT="1"), port(SLURM_JOB_ID="4712")}) == 4
    assert all(20000 <= port(SLURM_JOB_ID=str(job)) < 32000 for job in range(0, 5_000_000, 9973))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        TASK | {"RANK": "0", "MTP_DIST_PARENT": "7"},
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},
    ],
)
def test_other_environments_are_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt(LaunchConfig(), environment)
    assert environment == before


def test_a_task_leaves_what_an_outer_job_has_set() -> None:
    environment = TASK | {"SLURM_STEP_NUM_NODES": "1", "RANK": "9", "WORLD_SIZE": "64", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    adopt(LaunchConfig(), environment)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("3", "4")
    assert "TORCHELASTIC_USE_AGENT_STORE" not in environment


def test_the_address_is_the_given_one_or_this_machine_or_what_slurm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def address(launch: LaunchConfig, **others: str) -> str:
        environment = TASK | others
        adopt(launch, environment)
        return environment["MASTER_ADDR"]

    monkeypatch.setenv("PATH", str(tmp_path))
    assert address(LaunchConfig(master_addr="10.1.1.1")) == "10.1.1.1"
    assert address(LaunchConfig(), SLURM_STEP_NUM_NODES="1") == "127.0.0.1"
    with pytest.raises(UserError, match=r"scontrol cannot be run .* launch\.master_addr"):
        address(LaunchConfig())


def test_tasks_meet_in_one_job(tmp_path: Path) -> None:
    """Two processes with nothing but Slurm's variables join one group of DeepSpeed."""
    code = (
        "import sys; from mtp_dist.config.schema import LaunchConfig; import mtp_dist.slurm_step as s; s.adopt(LaunchConfig())\n"
        "import torch; from mtp_dist.parallel.mesh import choose_device, connect, disconnect; connect(choose_device('cpu'), 2)\n"
        "import torch.distributed as dist; found = torch.tensor(float(dist.get_rank() + 1)); dist.all_reduce(found)\n"
        "open(sys.argv[1], 'w').write(f'{found.item()} {dist.get_world_size()}'); disconnect()"
    )
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_ID": str(os.getpid() % 12000)}
    outer = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / str(rank))],
            env=outer | TASK | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, task in enumerate(tasks):
        _, errors = task.communicate(timeout=200)
        assert task.returncode == 0, errors
        assert (tmp_path / str(rank)).read_text() == "3.0 2"
