"""A process that srun started by itself, without torchrun: from Slurm's variables to those that torch and DeepSpeed read.

``srun --ntasks=4 python -m mtp_dist.train run_dir=runs/one`` makes each task one process of the job. ``torch_variables`` is pure;
``adopt`` asks Slurm for the address of the node of task 0 and sets the environment. Without these variables DeepSpeed would look
for an MPI. Source: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping

from mtp_dist.config.schema import LaunchConfig
from mtp_dist.errors import UserError
from mtp_dist.rank_environment import is_torch_rank, leave_outer_job

LOOPBACK = "127.0.0.1"


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a step of Slurm.

    A step of one task is a shell (``srun --pty bash``) or one command, which starts processes as anywhere else. A batch script is
    no task.
    """
    in_step = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
    return in_step and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def torch_variables(slurm: Mapping[str, str], address: str, port: int) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task.

    ``port`` 0: one drawn from the numbers of job, start and step, so that a step never meets what an earlier one has left.
    """
    # With --gpus-per-task a task sees its own GPU only, and that one is number 0.
    own_gpu = re.fullmatch(r"[^,]+", slurm.get("CUDA_VISIBLE_DEVICES", "")) is not None
    job, start, step = (int(slurm.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if own_gpu else slurm.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port or 20000 + (job * 101 + start * 11 + step) % 12000),
    }


def adopt(launch: LaunchConfig, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torch's variables where srun alone started this process; elsewhere do nothing. Raises UserError."""
    if not is_torch_rank(environment) and is_task(environment):
        leave_outer_job(environment)
        environment.update(torch_variables(environment, _address(launch, environment), launch.master_port))
        environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))


def _address(launch: LaunchConfig, slurm: Mapping[str, str]) -> str:
    """Address of the node of task 0: ``launch.master_addr`` where one is given, else what Slurm has recorded of the step's first
    node, whose name need not resolve."""
    if launch.master_addr != LOOPBACK:
        return launch.master_addr
    if slurm.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return LOOPBACK
    names = _scontrol("show", "hostnames", slurm.get("SLURM_STEP_NODELIST", "")).split()
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", names[0], "--oneliner")) if names else None
    if found is None:
        raise UserError("Slurm knows no address of this step's first node; prepare the run with launch.master_addr=ADDRESS")
    return found[1]


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"scontrol cannot be run on this node ({error}); give launch.master_addr=ADDRESS") from None
    return done.stdout
