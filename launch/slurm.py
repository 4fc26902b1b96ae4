"""Submit a training run to Slurm.

    python launch/slurm.py launch=slurm launch.nodes=2 launch.gpus_per_node=8 parallel.data=16 run_dir=runs/big ...
    python launch/slurm.py dry_run=true ...        print the script, write nothing

It takes the settings of ``python -m mtp_dist.train``: composes, checks and freezes them in the run folder, writes
``<run_dir>/train.sbatch`` from ``slurm/train.sbatch.template`` and submits it. A run that exists goes on with its own settings;
those that are typed beside ``run_dir=FOLDER`` lie over them. How such a job stops, requeues and resumes: ``docs/operations.md``.
"""

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from mtp_dist.config.command import application
from mtp_dist.config.layout import processes_per_node
from mtp_dist.config.schema import TrainingRun, setting
from mtp_dist.errors import UserError
from mtp_dist.freezing import changes, check, continued_as, freeze
from mtp_dist.run_lock import held

FOLDER = Path(__file__).resolve().parents[1]
TEMPLATE = FOLDER / "slurm" / "train.sbatch.template"
SCRIPT = "train.sbatch"
EXAMPLES = (
    "python launch/slurm.py launch=slurm run_dir=runs/big data.path=datasets/mine model=1b parallel.data=16 "
    "train.global_batch=64 data.lanes=16 train.steps=1000 launch.nodes=2 launch.gpus_per_node=8",
    "python launch/slurm.py run_dir=runs/big dry_run=true",
)


@dataclass
class SlurmRun(TrainingRun):
    """`python launch/slurm.py`: submit a training run to Slurm."""

    dry_run: bool = setting(False, "Print the batch script; write and submit nothing.")


class Template(string.Template):
    """``@@{name}``: the dollar belongs to the shell."""

    delimiter = "@@"


def render(config: TrainingRun, template: str, python: str, folder: str, working_folder: str) -> str:
    """The batch script of a checked run.

    ``python``: the interpreter on the nodes. ``folder``: where launch/ and slurm/ are. ``working_folder``: what relative paths of
    the settings start from. All three and ``config.run_dir`` are absolute. Raises UserError for a value that Slurm cannot take.
    """
    launch = config.launch
    # A step does not inherit the cores of a task (Slurm >= 22.05), so srun is told again.
    cores = launch.cpus_per_task * processes_per_node(config) if launch.cpus_per_task else None
    values = {
        "run_dir": config.run_dir,
        "script": f"{config.run_dir}/{SCRIPT}",
        "python": python,
        "folder": folder,
        "requeue": str(int(launch.requeue)),
        "max_restarts": str(launch.max_restarts),
        "signal_seconds": str(launch.signal_seconds),
        "master_port": str(launch.master_port),
        "gpus_per_node": str(launch.gpus_per_node or 0),
    }
    for name, value in values.items():
        _refuse_control_characters(name, value)
    assignments = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    assignments.append(f"srun_options=({f'--cpus-per-task={cores}' if cores else ''})")
    return Template(template).substitute(
        directives="\n".join(_directives(config, cores, working_folder)),
        assignments="\n".join(assignments),
        setup="\n".join(launch.setup) or ":",
    )


def _directives(config: TrainingRun, cores: int | None, working_folder: str) -> list[str]:
    launch = config.launch
    options = {
        "job-name": launch.job_name or Path(config.run_dir).name,
        "nodes": str(launch.nodes),
        "ntasks-per-node": "1",
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "gpus-per-node": str(launch.gpus_per_node) if launch.gpus_per_node else None,
        "cpus-per-task": str(cores) if cores else None,
        "mem": launch.mem,
        # In a file name Slurm replaces %j and the like.
        "output": f"{config.run_dir.replace('%', '%%')}/slurm-%j.out",
        "open-mode": "append",
        "chdir": working_folder,
        "signal": f"B:USR1@{launch.signal_seconds}" if launch.signal_seconds else None,
    }
    lines = [f"#SBATCH --{name}={slurm_quoted(name, value)}" for name, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue" if launch.requeue else "#SBATCH --no-requeue")
    for directive in launch.directives:
        if not re.fullmatch(r"--?[A-Za-z][^\n\r]*", directive):
            raise UserError(f"launch.directives: {directive!r} is not an sbatch option; write --option=value")
        lines.append(f"#SBATCH {directive}")
    return lines


def slurm_quoted(name: str, value: str) -> str:
    """A value as Slurm's own parser of #SBATCH lines takes it: it knows double quotes and backslashes, also inside of quotes."""
    _refuse_control_characters(name, value)
    if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _refuse_control_characters(name: str, value: str) -> None:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise UserError(f"{name}={value!r} holds a control character (a line break?), which a batch script cannot; remove it")


def submit(script: Path) -> str:
    """Hand the script to sbatch; the job id. Raises UserError with Slurm's own reason."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed here; submit from a login node, or start slurm/local_cluster.sh here")
    # What an outer job has set (SLURM_*, SBATCH_*) would overrule the script.
    outer = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        reason = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        raise UserError(f"Slurm refused {script}: {reason or f'sbatch ended with status {done.returncode}'}")
    return done.stdout.strip().split(";")[0]


def launch(config: SlurmRun) -> int:
    """Check, freeze, render and submit; or print the script."""
    run = TrainingRun(**{item.name: getattr(config, item.name) for item in fields(TrainingRun)})
    run.run_dir = os.path.abspath(run.run_dir) if run.run_dir else ""
    # The cores of the nodes are not those of this machine.
    run = check(run, cores=0)
    # Not resolved: the link of a virtual environment is what makes it one.
    python = os.path.abspath(sys.executable)
    text = render(run, TEMPLATE.read_text(encoding="utf-8"), python, str(FOLDER), os.getcwd())
    changed = changes(run)
    if config.dry_run:
        print(text, end="", flush=True)
        print("".join(f"{line}\n" for line in changed), end="", file=sys.stderr)
        return 0
    script = Path(run.run_dir) / SCRIPT
    # Refused while a job is at work there.
    with held(run.run_dir):
        for line in changed:
            print(line)
        freeze(run)
        script.write_text(text, encoding="utf-8")
    job = submit(script)
    if run.train.deterministic and not run.launch.threads:
        print("note: launch.threads and launch.cpus_per_task are not given: other nodes may round otherwise")
    print(f"submitted job {job}")
    print(f"  watch:           squeue --job {job}; tail -F {shlex.quote(f'{run.run_dir}/slurm-{job}.out')}")
    print(f"  save and requeue: scancel --batch --signal=USR1 {job}")
    print(f"  cancel:          scancel {job}")
    return 0


def main() -> None:
    """The command line."""
    resumed = partial(continued_as, SlurmRun, "train")
    application("train", SlurmRun, launch, shortcut=resumed, command="python launch/slurm.py", examples=EXAMPLES)


if __name__ == "__main__":
    main()
