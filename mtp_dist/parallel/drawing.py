"""The placement as a person reads it before the first step: who holds what, with sizes. Pure functions of the settings.

    layout: pipeline 2 (zbv, placement balanced) x tensor 1 x data 1; attention masked (documents; cpu)
    pipeline rank  0                       1
    down           embedding, layers 0-4 → layers 5-9 ┐
    up             2 MTP modules, head   ← layers 10-15 ┘
    parameters     3.1M                    2.9M
    work           10.2 layers             10.9 layers
"""

from mtp_dist.config.attention import Choice
from mtp_dist.config.heads import modules
from mtp_dist.config.layout import chunks, chunks_of_rank, is_v
from mtp_dist.config.schema import TrainingRun
from mtp_dist.parallel.budget import rank_parameters
from mtp_dist.parallel.placement import layers_of_chunks, rank_costs

COLUMNS = 6
"""Pipeline ranks that are drawn side by side; more of them get a line each."""


def placement_drawing(config: TrainingRun, attention: Choice) -> str:
    """The layout and the attention backend, then the pipeline ranks: their chunks in the order in which a micro-batch passes,
    their parameters (of each tensor rank) and their work in trunk layers."""
    parallel = config.parallel
    kind = f"{parallel.schedule}, placement {parallel.placement}" if parallel.pipeline > 1 else "no pipeline"
    sizes = f"pipeline {parallel.pipeline} ({kind}) x tensor {parallel.tensor} x data {parallel.data}"
    title = f"layout: {sizes}; attention {attention}"
    return "\n".join([title, *(_side_by_side(config) if parallel.pipeline <= COLUMNS else _one_line_each(config))])


def _side_by_side(config: TrainingRun) -> list[str]:
    parallel, ranks = config.parallel, range(config.parallel.pipeline)
    of_rank = [chunks_of_rank(parallel, rank) for rank in ranks]
    v, rounds = is_v(parallel), range(len(of_rank[0]))
    names = ["down", "up"] if v else ["holds"] if len(rounds) == 1 else [f"round {number + 1}" for number in rounds]
    rows = [("pipeline rank", " ", [str(rank) for rank in ranks])]
    for number, name in zip(rounds, names, strict=True):
        arrow = "←" if name == "up" else "→"
        rows.append((name, arrow, [_held(config, own[number]) for own in of_rank]))
    if v:
        rows[1][2][-1] += " ┐"
        rows[2][2][-1] += " ┘"
    rows.append(("parameters", " ", [shown_count(rank_parameters(config, rank).total) for rank in ranks]))
    rows.append(("work", " ", [f"{cost:.1f} layers" for cost in rank_costs(config)]))
    widths = [max(len(cells[rank]) for _, _, cells in rows) for rank in ranks]
    return [
        f"{name:15}{f' {between} '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))}".rstrip()
        for name, between, cells in rows
    ]


def _one_line_each(config: TrainingRun) -> list[str]:
    lines = []
    for rank, cost in enumerate(rank_costs(config)):
        held = "; ".join(_held(config, number) for number in chunks_of_rank(config.parallel, rank))
        parameters = shown_count(rank_parameters(config, rank).total)
        lines.append(f"  pipeline rank {rank}: {held} ({parameters} parameters, work of {cost:.1f} layers)")
    return lines


def _held(config: TrainingRun, number: int) -> str:
    """What a chunk holds."""
    part, count = layers_of_chunks(config)[number], modules(config.mtp)
    held = ["embedding"] if number == 0 else []
    if part:
        held.append(f"layer {part[0]}" if len(part) == 1 else f"layers {part[0]}-{part[-1]}")
    if number == chunks(config.parallel) - 1:
        held += [f"{count} MTP module{'s' if count > 1 else ''}"] if count else []
        held.append("head")
    return ", ".join(held) or "nothing"


def shown_count(number: int) -> str:
    """12,345,678 as 12.3M."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
