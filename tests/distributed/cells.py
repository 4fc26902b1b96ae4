"""The generated part of the grid: the full block at PP = 2, and an array in which every pair of values of ``AXES`` meets.

What a cell may be is decided by ``validate_training`` alone; here stand only the limits of a test machine and what a value means.

    python -m tests.distributed.cells      prints the cells, and the pairs that cannot be with the reason
"""

from functools import cache
from itertools import product
from typing import Any

from mtp_dist.config.heads import KINDS
from mtp_dist.config.layout import SCHEDULES, fewest_micro_batches
from mtp_dist.config.validation import validate_training
from mtp_dist.errors import UserError
from tests.distributed.covering import Cell, CoveringArray, covering_array
from tests.distributed.layouts import ESSENTIAL, LAYOUTS, ROWS, processes, unchecked

ORDINARY, MOST = 4, 8
"""Processes of a cell at most, in an ordinary test run and in a full one: a pair that fits into the first is tested there."""
PASSES = 4
"""Micro-batches, or more where the schedule needs more."""

AXES: dict[str, tuple[Any, ...]] = {
    "pipeline": (1, 2, 4),
    "schedule": ("none", *SCHEDULES),
    "tensor": (1, 2),
    "kv_heads": (2, 1),  # of four query heads; tensor ranks beyond them hold the same one
    "data": (1, 2, 4),
    "stage": (1, 0, 2, 3),
    "depth": (1, 0, 3),
    "recompute": ("none", "selective", "full"),
    "dtype": ("float32", "bfloat16"),
    "document_mask": (True, False),
    "attention": ("masked", "causal"),
    "sequence_parallel": (False, True),
    "tie": (True, False),
    "vocabulary": (96, 97),
    "freeze_trunk": (False, True),
    "head_lr_ratio": (1, 3),
    "offload": (False, True),
    "kind": ("sequential", *(kind for kind in KINDS if kind != "sequential")),
    "repeat": (False, True),
    "blocks": (1, 2),
    "detach": (False, True),
    "targets": ("tokens", "trunk"),
    "stride": (1, 2),
    "curriculum": ((), ((0, 1), (256, 3))),  # all three depths from the second step on
    "projection": ("shared", "own"),
    "embedding": ("shared", "own"),
    "scheduled_sampling": (0, 0.5),
    "main_loss_weight": (1, 0.5),
    "adversarial": (0, 0.5),
    "draft_vocabulary": (None, 30),
}
"""Names of ``layouts.PATHS`` -> values. The first ones make a valid cell together, from which the search starts."""

LAYOUT = ("pipeline", "schedule", "tensor", "data", "stage", "depth", "dtype")
"""Axes that are always named."""

OF_HEADS = (
    "head_lr_ratio", "repeat", "blocks", "detach", "targets", "stride", "curriculum", "projection", "embedding",
    "scheduled_sampling", "adversarial", "draft_vocabulary",
)  # fmt: skip
"""Axes that mean nothing without heads."""

BLOCK_AXES: dict[str, tuple[Any, ...]] = {
    "pipeline": (2,),
    "schedule": ("zbv", "1f1b"),
    "tensor": (1, 2),
    "data": (1, 2),
    "stage": (0, 1),
    "depth": (0, 2),
}


def settings_of(cell: Cell) -> dict[str, Any]:
    """A cell as the settings of a layout."""
    parallel = unchecked(cell).parallel
    passes = max(PASSES, fewest_micro_batches(parallel))
    return cell | {"micro_batch": max(1, ROWS // (parallel.data * passes))}


def refusal(cell: Cell, most: int = MOST) -> str | None:
    """Why a cell cannot be with so many processes, or None."""
    if processes(cell) > most:
        return f"more than {most} processes"
    # A value without effect would count as covered without being tested.
    if cell["pipeline"] == 1 and cell["schedule"] != "none":
        return "one pipeline rank has no schedule"
    if cell["tensor"] == 1 and cell["sequence_parallel"]:
        return "one tensor rank shares no positions"
    if cell["depth"] == 0 and any(cell[axis] != AXES[axis][0] for axis in OF_HEADS):
        return "no heads have no learning rate, no blocks and no losses"
    if cell["depth"] == 1 and cell["repeat"]:
        return "one depth repeats nothing"
    if cell["freeze_trunk"] and cell["detach"]:
        return "a frozen trunk gets no gradient anyway"
    if cell["kind"] == "eagle" and cell["detach"]:
        return "EAGLE's losses never reach the trunk"
    if cell["scheduled_sampling"] and cell["dtype"] == "bfloat16" and cell["tensor"] > 1:
        # Tensor ranks round otherwise than one process, and a near tie decides which token is fed: tolerances are not for that.
        return "own predictions of tensor ranks in bfloat16 are others where two logits nearly tie"
    try:
        validate_training(unchecked(settings_of(cell)), None)
    except UserError as error:
        return str(error)
    return None


def name_of(cell: Cell) -> str:
    """What tests call a cell: its layout, and what differs from the first values of ``AXES``."""
    short = {"pipeline": "pp", "tensor": "tp", "data": "dp", "stage": "zero", "depth": "depth", "vocabulary": "v"}
    short |= {"recompute": "recompute_", "head_lr_ratio": "rate", "blocks": "blocks", "stride": "stride"}
    short |= {"adversarial": "adversary", "draft_vocabulary": "draft", "projection": "projection_", "embedding": "embedding_"}
    short |= {"kv_heads": "kv"}
    short |= {"scheduled_sampling": "sampled", "main_loss_weight": "main"}
    words = []
    for axis, value in cell.items():
        if axis not in LAYOUT and value == AXES[axis][0]:
            continue
        if isinstance(value, bool):
            words.append(("" if value else "no_") + axis.split("_")[0])
        elif axis == "curriculum":
            words.append(axis)
        elif value != "none":
            words.append(f"{short.get(axis, '')}{value}")
    return "-".join(words)


@cache
def covering() -> CoveringArray:
    """The array over ``AXES``; its cells of at most ``ORDINARY`` processes hold every pair that fits there."""
    small = covering_array(AXES, lambda cell: refusal(cell, ORDINARY))
    large = covering_array(AXES, refusal, given=small.cells)
    return CoveringArray(small.cells + large.cells, large.impossible)


def block() -> list[Cell]:
    """Every combination of ``BLOCK_AXES``."""
    return [dict(zip(BLOCK_AXES, values, strict=True)) for values in product(*BLOCK_AXES.values())]


def all_cells() -> dict[str, dict[str, Any]]:
    """name -> settings of the named layouts and of the generated cells."""
    return LAYOUTS | {name_of(cell): settings_of(cell) for cell in [*block(), *covering().cells]}


CELLS = all_cells()
"""Every cell of the grid."""


def is_ordinary(name: str) -> bool:
    """Whether every test run trains a cell: the essential layouts, and the block where it fits; the others are for a full one."""
    return name in ESSENTIAL or (name in {name_of(cell) for cell in block()} and processes(CELLS[name]) <= ORDINARY)


if __name__ == "__main__":
    array = covering()
    for cell in sorted(array.cells, key=processes):
        print(processes(cell), name_of(cell))
    for pair, reasons in array.impossible.items():
        print(", ".join(f"{axis}={value}" for axis, value in pair) + ":", *reasons, sep="\n    ")
    print(len(array.cells), "cells;", len(array.impossible), "pairs cannot be")
