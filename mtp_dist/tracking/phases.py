"""Where the time of a run went, from its metrics."""

from collections.abc import Sequence
from typing import Any

from mtp_dist.tracking import names

OF_A_STEP = {
    names.DATA_WAIT: "waiting for data",
    names.FORWARD_BACKWARD_TIME: "forward and backward",
    names.OPTIMIZER_TIME: "optimizer",
}
BESIDE = {names.VALIDATION_TIME: "validation", names.SAVE_TIME: "saving"}
REST = "agreement and the rest"


def phase_seconds(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Phase -> seconds of the whole run; empty for a run that did not measure them.

    A step that was not logged counts as the next one that was. Saving is the time that training waited for it.
    """
    found = dict.fromkeys([*OF_A_STEP.values(), REST, *BESIDE.values()], 0.0)
    measured, last = False, 0
    for record in records:
        if names.STEP_TIME in record:
            steps, last = record["step"] - last, record["step"]
            parts = {phase: steps * record.get(name, 0.0) for name, phase in OF_A_STEP.items()}
            measured = measured or names.FORWARD_BACKWARD_TIME in record
            for phase, seconds in parts.items():
                found[phase] += seconds
            found[REST] += max(0.0, steps * record[names.STEP_TIME] - sum(parts.values()))
        for name, phase in BESIDE.items():
            found[phase] += record.get(name, 0.0)
    return found if measured else {}
