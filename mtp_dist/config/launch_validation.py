"""Formats of ``launch.`` and ``tracker.`` settings that another program reads: Slurm, torchrun, wandb.

A wrong one would be refused by that program later, or lost without a word. Pure, as ``validation``, which calls this.
"""

import re

from mtp_dist.config.rules import one_of
from mtp_dist.config.schema import LaunchConfig, TrackerConfig
from mtp_dist.errors import UserError

_TIMES = (
    r"(?P<m>\d+)(?::(?P<s>[0-5]?\d))?",
    r"(?P<h>\d+):(?P<m>[0-5]?\d):(?P<s>[0-5]?\d)",
    r"(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>[0-5]?\d)(?::(?P<s>[0-5]?\d))?)?",
)
"""sbatch(1), --time."""
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_OWN_OPTIONS = {
    "job-name": "launch.job_name", "J": "launch.job_name",
    "nodes": "launch.nodes", "N": "launch.nodes",
    "ntasks": "launch.processes_per_node", "n": "launch.processes_per_node",
    "ntasks-per-node": "launch.processes_per_node",
    "time": "launch.time", "t": "launch.time",
    "partition": "launch.partition", "p": "launch.partition",
    "account": "launch.account", "A": "launch.account",
    "qos": "launch.qos", "q": "launch.qos",
    "gpus-per-node": "launch.gpus_per_node",
    "cpus-per-task": "launch.cpus_per_task", "c": "launch.cpus_per_task",
    "mem": "launch.mem",
    "signal": "launch.signal_seconds",
    "requeue": "launch.requeue", "no-requeue": "launch.requeue",
    "output": "run_dir", "o": "run_dir", "open-mode": "run_dir", "chdir": "run_dir", "D": "run_dir",
}  # fmt: skip
"""Options of sbatch that the script sets, and the setting that each follows from."""
WANDB_PROJECT = 128
WANDB_TAG = 64
WANDB_FORBIDDEN = "/\\#?%:"
"""What wandb 0.31 refuses (wandb/sdk/wandb_settings.py: validate_project, validate_run_tags)."""


def validate_formats(launch: LaunchConfig) -> None:
    """Raise UserError at the first setting that Slurm or torchrun would not take."""
    seconds = time_limit(launch.time)
    if seconds is None:
        raise UserError(
            f"launch.time={launch.time} is not a time limit Slurm accepts; write hours:minutes:seconds (24:00:00), "
            "days-hours:minutes:seconds (2-00:00:00), or minutes (90)"
        )
    if seconds == 0:
        raise UserError(f"launch.time={launch.time} leaves no time to train; choose a longer limit, such as 24:00:00")
    if launch.signal_seconds >= seconds:
        raise UserError(
            f"launch.signal_seconds={launch.signal_seconds} is not less than launch.time={launch.time}: the job would be told to "
            "stop as it starts; choose fewer seconds, or a longer limit"
        )
    if launch.mem is not None and not re.fullmatch(r"\d{1,12}[KMGT]?", launch.mem, re.IGNORECASE | re.ASCII):
        raise UserError(f"launch.mem={launch.mem} is not an amount of memory; write 64G, 64000M, or 0 for all of a node")
    for name in ("partition", "account", "qos"):
        word = getattr(launch, name)
        if word is not None and not re.fullmatch(r"[\w.@+-]+(,[\w.@+-]+)*", word, re.ASCII):
            raise UserError(f"launch.{name}={word!r} is not a Slurm name; write letters, digits and _ . @ + -, without spaces")
    if launch.job_name is not None and not (launch.job_name.strip() and launch.job_name.isprintable()):
        raise UserError(f"launch.job_name={launch.job_name!r} is not a job name; write one line of printable text, or null")
    if not re.fullmatch(r"[A-Za-z0-9_.:%-]{1,253}", launch.master_addr):
        raise UserError(f"launch.master_addr={launch.master_addr!r} is neither a host name nor an address, such as 10.0.0.1")
    for directive in launch.directives:
        _validate_directive(directive)
    for line in launch.setup:
        if "\0" in line:
            raise UserError(f"launch.setup: {line!r} holds a zero byte, which no shell reads; remove it")


def time_limit(text: str) -> float | None:
    """Seconds of a time limit as sbatch takes it, infinite where there is none; None for anything else."""
    if text.lower() in ("unlimited", "infinite"):
        return float("inf")
    for pattern in _TIMES:
        if len(text) <= 20 and (match := re.fullmatch(pattern, text, re.ASCII)):
            return sum(int(number) * _SECONDS[unit] for unit, number in match.groupdict().items() if number)
    return None


def _validate_directive(directive: str) -> None:
    match = re.fullmatch(r"(?:--([A-Za-z][\w-]*)(?:[= ].*)?|-([A-Za-z])(?:[ =]?\S.*)?)", directive)
    if match is None or not directive.isprintable():
        raise UserError(f"launch.directives: {directive!r} is not an sbatch option; write --option=value")
    name = match[1] or match[2]
    if name in _OWN_OPTIONS:
        raise UserError(f"launch.directives: {directive} is set by {_OWN_OPTIONS[name]}; give that instead")
    if name in ("array", "a", "wrap"):
        raise UserError(f"launch.directives: {directive} would make several jobs of one run folder; submit a run for each")


def validate_tracker(tracker: TrackerConfig) -> None:
    """Raise UserError at what wandb would refuse once the run has begun, which would then go on without it."""
    one_of("tracker.wandb", tracker.wandb, ["offline", "online", "disabled"])
    if len(tracker.project) > WANDB_PROJECT:
        raise UserError(f"tracker.project has {len(tracker.project)} characters; wandb takes at most {WANDB_PROJECT}")
    _require_text("tracker.project", tracker.project)
    if found := sorted(set(tracker.project) & set(WANDB_FORBIDDEN)):
        none_of = " ".join(WANDB_FORBIDDEN)
        raise UserError(f"tracker.project={tracker.project} holds {' '.join(found)}; wandb allows none of {none_of}")
    for name in ("entity", "name"):
        word = getattr(tracker, name)
        if word is not None:
            _require_text(f"tracker.{name}", word)
    if tracker.entity is not None and not re.fullmatch(r"[\w-]+", tracker.entity, re.ASCII):
        raise UserError(f"tracker.entity={tracker.entity} is not a wandb user or team; write letters, digits, - and _")
    if tracker.name is not None and len(tracker.name) > WANDB_PROJECT:
        raise UserError(f"tracker.name has {len(tracker.name)} characters; wandb takes at most {WANDB_PROJECT}")
    for tag in tracker.tags:
        if not 1 <= len(tag) <= WANDB_TAG:
            raise UserError(f"tracker.tags: {tag[:WANDB_TAG]!r} has {len(tag)} characters; wandb takes 1 to {WANDB_TAG}")
        _require_text("tracker.tags", tag)
    if len(set(tracker.tags)) < len(tracker.tags):
        raise UserError(f"tracker.tags={tracker.tags} names a tag twice; leave one out")


def _require_text(key: str, text: str) -> None:
    """One line of characters that UTF-8 has: wandb's records are protobuf strings."""
    if not text.strip():
        raise UserError(f"{key} is empty; write a name, or leave it out")
    if not text.isprintable():
        raise UserError(f"{key}={text!r} holds characters that cannot be printed; remove them")
