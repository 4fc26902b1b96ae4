"""Places in a save where a test may end the process, as a power cut or the kernel would: off unless MTP_DIST_FAULT names one.

    MTP_DIST_FAULT=write.middle:1      rank 1 kills itself in the middle of its first file
    MTP_DIST_FAULT=manifest.after:0:2  rank 0, the second time that it comes there

``POINTS`` lists the places in the order of a save. Without the variable a place costs one look into the environment, ten times a
save.
"""

import os
import signal
from collections import Counter

VARIABLE = "MTP_DIST_FAULT"
POINTS = (
    "snapshot.before",
    "snapshot.middle",
    "snapshot.after",
    "write.before",
    "write.middle",
    "write.after",
    "write.synced",
    "commit.before",
    "commit.files",
    "manifest.before",
    "manifest.after",
    "rename.before",
    "rename.after",
    "latest.before",
    "latest.after",
    "prune.before",
    "prune.middle",
    "prune.after",
)
_passed: Counter[str] = Counter()


def point(name: str) -> None:
    """Die here by SIGKILL if the environment asks this rank to."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    where, rank, *times = wanted.split(":")
    if where != name or rank != os.environ.get("RANK", "0"):
        return
    _passed[name] += 1
    if _passed[name] == int(times[0] if times else 1):
        os.kill(os.getpid(), signal.SIGKILL)
