"""Which process of a job this one is: told apart by variables that only what starts ranks sets.

torchrun, a cluster's operator and people's own scripts use the same names (RANK, WORLD_SIZE, MASTER_ADDR, PET_NNODES). Outside a
rank they belong to somebody else: they make no rank of a process, and ``own_variables`` keeps them from what is started here.
A rank is a process with ``MTP_DIST_PARENT``, which ``elastic_agent`` sets, or one of a torchrun that somebody else started, which
sets all of ``_TORCHRUN``. Source: https://docs.pytorch.org/docs/stable/elastic/run.html
"""

import os
import re
from collections.abc import Mapping, MutableMapping

PARENT = "MTP_DIST_PARENT"
"""Id of the process that started this rank and must outlive it; 0: a rank whose parent is not watched."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
# PET_: torchrun's own options, by variables. TORCH_ELASTIC_SHUTDOWN_TIMEOUT is a wish, and stays.
_OUTER = re.compile(
    r"(PET|TORCHELASTIC)_.*|TORCH_WORKER_SERVER_SOCKET|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|"
    r"(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|ROLE_NAME|" + PARENT
)


def is_torch_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, ours or another, started this process as a rank."""
    return "RANK" in environment and (PARENT in environment or all(name in environment for name in _TORCHRUN))


def own_variables(outer: Mapping[str, str]) -> dict[str, str]:
    """``outer`` without what would place a process in another job."""
    return {name: value for name, value in outer.items() if not _OUTER.fullmatch(name)}


def leave_outer_job(environment: MutableMapping[str, str] = os.environ) -> None:
    """The same, in place."""
    for name in [name for name in environment if _OUTER.fullmatch(name)]:
        del environment[name]


def ignored_place(environment: Mapping[str, str]) -> str:
    """The variables by which an outer launcher seems to mean one of several nodes, as they would be typed; empty: none."""
    if is_torch_rank(environment):
        return ""
    found = [name for name in ("WORLD_SIZE", "RANK", "PET_NNODES", "PET_NODE_RANK") if environment.get(name, "1") != "1"]
    several = any(environment.get(name, "1") != "1" for name in ("WORLD_SIZE", "PET_NNODES"))
    return " ".join(f"{name}={environment[name]}" for name in found) if several else ""
