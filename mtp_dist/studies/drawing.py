"""Plots of an experiment: bars with intervals, and curves over training."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtp_dist.studies.experiment import Column
from mtp_dist.studies.results import Results

COLORS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9a9a9a", "#7a5195", "#806000")


def bars(results: Results, columns: Sequence[Column], title: str) -> Figure:
    """A panel a column, a bar a variant, with the interval over seeds and a dot a seed."""
    shown = results.keys(columns)
    figure, axes = plt.subplots(
        1, len(shown), figsize=(1.5 + 3.2 * len(shown), 1.6 + 0.34 * len(results.outcomes)), squeeze=False, layout="constrained"
    )
    names = list(results.outcomes)
    for position, (ax, column) in enumerate(zip(axes[0], shown, strict=True)):
        for place, name in enumerate(names):
            mean = results.mean(name, column.key)
            if mean is None:
                continue
            color = COLORS[place % len(COLORS)]
            ax.barh(place, mean.mean, xerr=mean.half, color=color, alpha=0.75, capsize=3)
            values = results.values(name, column.key)
            ax.plot(values, [place] * len(values), "o", color="white", markeredgecolor=color, markersize=4, zorder=3)
        ax.set_yticks(range(len(names)), names if position == 0 else [""] * len(names))
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_xlabel(column.title, fontsize=9)
        _clean(ax)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def curves(results: Results, key: str, y: str, title: str, guess: tuple[float, str]) -> Figure:
    """The named curve of every variant over the steps: pale for each seed, strong for their mean. `guess`: what guessing gives,
    and its name."""
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, (name, outcomes) in enumerate(results.outcomes.items()):
        found = [outcome.curves[key] for outcome in outcomes if key in outcome.curves]
        if not found:
            continue
        color = COLORS[place % len(COLORS)]
        for points in found:
            ax.plot(*np.array(points, float).T, color=color, alpha=0.25, linewidth=0.9)
        mean = np.mean([np.array(points, float)[:, 1] for points in found], axis=0)
        ax.plot(np.array(found[0], float)[:, 0], mean, color=color, linewidth=1.8, label=name)
    height, text = guess
    ax.axhline(height, color="#9a9a9a", linestyle="--", linewidth=1)
    ax.annotate(text, (1.0, height), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom", color="#606060")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(y)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set_title(title, fontsize=12, fontweight="bold")
    _clean(ax)
    return figure


def _clean(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
