"""The plot of a decoding report: acceptance of each depth, tokens of a forward, and the cost of a pass over several tokens."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtp_dist.tracking.plots import DEPTH_COLORS, MAIN_COLOR


def draw(result: dict[str, Any]) -> Figure:
    """result: what ``decode_report`` writes; one row of plots for each part of it."""
    parts = result["parts"]
    figure, rows = plt.subplots(len(parts), 3, figsize=(12, 3.6 * len(parts)), layout="constrained", squeeze=False)
    for axes, part in zip(rows, parts, strict=True):
        _draw_part(axes, part, f"{Path(part['file']).name}, temperature {part['temperature']:g}: " if len(parts) > 1 else "")
    return figure


def _draw_part(row: Any, part: dict[str, Any], title: str) -> None:
    left, middle, right = row
    fast, curve = part["speculative"], part["verify_cost"]
    depths = range(1, len(fast["acceptance"]) + 1)
    for name, label, color in (
        ("acceptance", "of all drafts", DEPTH_COLORS[0]),
        ("conditional_acceptance", "of those reached", DEPTH_COLORS[1]),
    ):
        shares = [float("nan") if share is None else share for share in fast[name]]
        left.plot(depths, shares, marker="o", color=color, label=label)
    left.set(title=f"{title}drafts accepted", xlabel="depth", ylabel="share of drafts", ylim=(0, 1.02))
    left.legend(frameon=False)
    counts = fast["histogram"][1:]
    middle.bar(range(1, len(counts) + 1), counts, color=DEPTH_COLORS[2])
    middle.set(title="tokens of a forward", xlabel="tokens of a forward", ylabel="forwards")
    right.plot(range(1, len(curve) + 1), curve, marker="o", color=MAIN_COLOR)
    title = f"cost of a pass, v(n); a draft: {part['draft_cost']:.2f}"
    right.set(title=title, xlabel="n, tokens", ylabel="cost (a pass over one token: 1)", ylim=(0, 1.1 * max(curve)))
    for axes in row:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
