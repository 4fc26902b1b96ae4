"""The plots of a run's report, drawn from the records of metrics.jsonl alone.

Each function takes a ``Series`` view of the records and returns a matplotlib figure, or None where the run has nothing for it.
One colour stands for one depth in every plot; training is a line (pale, with its running mean over it, where it has many points),
validation its markers, a dotted vertical line a step from which the run was resumed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from mtp_dist.tracking import names
from mtp_dist.tracking.phases import OF_A_STEP

MAIN_COLOR = "#1b1b1b"
TOTAL_COLOR = "#9a9a9a"
DEPTH_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
UNITS = ((1e9, " (billion)"), (1e6, " (million)"), (1e3, " (thousand)"))
# From so many points on the raw curve is pale and its running mean is drawn over it.
SMOOTH_FROM = 20
START_COLOR = "#7a5195"


class Series:
    """The records of a run as curves over tokens trained (over steps, where the run did not log tokens)."""

    def __init__(
        self, records: Sequence[dict[str, Any]], resumed: Sequence[int] = (), stopped: int | None = None
    ) -> None:
        """``resumed``: steps from which the run went on after a stop or a kill. ``stopped``: the step at which it rests now."""
        self.records, self.resumed, self.stopped = records, resumed, stopped
        known = [(record["step"], record[names.TOKENS_SEEN]) for record in records if names.TOKENS_SEEN in record]
        self.over_tokens = bool(known)
        steps, tokens = zip(*known, strict=True) if known else ((0,), (0,))
        self._steps, self._tokens = np.array(steps, float), np.array(tokens, float)
        largest = float(self._tokens.max()) if known else 0.0
        self._unit, unit_name = next(((size, name) for size, name in UNITS if largest >= size), (1.0, ""))
        self.label = f"tokens trained{unit_name}" if known else "optimizer step"

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """x [n], y [n] of one metric; a non-finite value is NaN, which matplotlib draws as a gap."""
        points = [(record["step"], record[name]) for record in self.records if name in record]
        if not points:
            return np.empty(0), np.empty(0)
        steps, values = (np.array(column, float) for column in zip(*points, strict=True))
        return self.position(steps), np.where(np.isfinite(values), values, np.nan)

    def position(self, steps: np.ndarray) -> np.ndarray:
        """Where steps [n] lie on the x axis."""
        if not self.over_tokens:
            return steps
        # The run begins with step 0 and no tokens, which no record says.
        return np.interp(steps, np.append(0.0, self._steps), np.append(0.0, self._tokens)) / self._unit

    def depths(self, prefix: str) -> list[int]:
        """Depths of which the run has this metric, ascending."""
        found = {name.removeprefix(prefix) for record in self.records for name in record if name.startswith(prefix)}
        return sorted(int(depth) for depth in found if depth.isdigit())


def depth_color(depth: int) -> str:
    return DEPTH_COLORS[(depth - 1) % len(DEPTH_COLORS)]


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last ``width`` values [n] -> [n]; NaN values are left out, a window without any other is NaN."""
    valid = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(valid, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(valid)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    seen = count[end] - count[start]
    return np.where(seen > 0, (total[end] - total[start]) / np.maximum(seen, 1), np.nan)


def draw_loss(series: Series) -> Figure | None:
    """Training losses as lines, validation losses as markers."""
    if not any(len(series.curve(name)[0]) for name in (names.LOSS_MAIN, names.LOSS_TOTAL)):
        return None
    figure, axes = _canvas(1, "Loss")
    ax = axes[0]
    _line(ax, series, names.LOSS_TOTAL, "total (what is differentiated)", TOTAL_COLOR, dashed=True)
    _line(ax, series, names.LOSS_MAIN, "main (next token)", MAIN_COLOR)
    for depth in series.depths(names.LOSS_DEPTH):
        _line(ax, series, names.of_depth(names.LOSS_DEPTH, depth), f"depth {depth}", depth_color(depth))
    _markers(ax, series, names.VALIDATION_LOSS_TOTAL, "validation total", TOTAL_COLOR)
    _markers(ax, series, names.VALIDATION_LOSS_MAIN, "validation main", MAIN_COLOR)
    for depth in series.depths(names.VALIDATION_LOSS_DEPTH):
        _markers(ax, series, names.of_depth(names.VALIDATION_LOSS_DEPTH, depth), f"validation depth {depth}", depth_color(depth))
    ax.set_ylabel("cross-entropy (nats per token)")
    return _finished(figure, axes, series)


def draw_accuracy(series: Series) -> Figure | None:
    """Accuracy of the trunk and each depth, and conditional accuracy: what the decoder may hope to accept."""
    if not len(series.curve(names.ACCURACY_MAIN)[0]):
        return None
    conditional = series.depths(names.ACCURACY_CONDITIONAL_DEPTH)
    figure, axes = _canvas(2 if conditional else 1, "Accuracy of the argmax")
    _line(axes[0], series, names.ACCURACY_MAIN, "main (next token)", MAIN_COLOR)
    _markers(axes[0], series, names.VALIDATION_ACCURACY_MAIN, "validation main", MAIN_COLOR)
    for depth in series.depths(names.ACCURACY_DEPTH):
        _line(axes[0], series, names.of_depth(names.ACCURACY_DEPTH, depth), f"depth {depth}", depth_color(depth))
    for depth in series.depths(names.VALIDATION_ACCURACY_DEPTH):
        name = names.of_depth(names.VALIDATION_ACCURACY_DEPTH, depth)
        _markers(axes[0], series, name, f"validation depth {depth}", depth_color(depth))
    axes[0].set_ylabel("share of all targets")
    for depth in conditional:
        _line(axes[1], series, names.of_depth(names.ACCURACY_CONDITIONAL_DEPTH, depth), f"depth {depth}", depth_color(depth))
    for depth in series.depths(names.VALIDATION_ACCURACY_CONDITIONAL_DEPTH):
        name = names.of_depth(names.VALIDATION_ACCURACY_CONDITIONAL_DEPTH, depth)
        _markers(axes[1], series, name, f"validation depth {depth}", depth_color(depth))
    if conditional:
        axes[1].set_ylabel("share where all before is right")
    for ax in axes:
        _from_zero(ax)
    return _finished(figure, axes, series)


def draw_optimizer(series: Series) -> Figure | None:
    """Learning rate, gradient norm before clipping, and lambda."""
    panels = [
        (names.LEARNING_RATE, "learning rate"),
        (names.GRADIENT_NORM, "gradient norm"),
        (names.LOSS_WEIGHT, "MTP loss weight λ"),
    ]
    panels = [panel for panel in panels if len(series.curve(panel[0])[0])]
    if not panels:
        return None
    figure, axes = _canvas(len(panels), "Optimizer")
    for ax, (name, label) in zip(axes, panels, strict=True):
        _line(ax, series, name, label, MAIN_COLOR, smooth=name == names.GRADIENT_NORM)
        ax.set_ylabel(label)
        if name == names.GRADIENT_NORM:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            ax.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        else:
            _from_zero(ax)
    return _finished(figure, axes, series, legend=False)


def draw_speed(series: Series) -> Figure | None:
    """Tokens a second, where the time of a step goes, and memory."""
    if not len(series.curve(names.TOKENS_PER_SECOND)[0]):
        return None
    memory = [name for name in (names.MEMORY_RSS, names.MEMORY_DEVICE_PEAK) if len(series.curve(name)[0])]
    figure, axes = _canvas(3 if memory else 2, "Speed and memory" if memory else "Speed")
    _line(axes[0], series, names.TOKENS_PER_SECOND, "all replicas", MAIN_COLOR)
    axes[0].set_ylabel("tokens per second")
    _line(axes[1], series, names.STEP_TIME, "whole step", MAIN_COLOR)
    for (name, phase), color in zip(OF_A_STEP.items(), (DEPTH_COLORS[1], DEPTH_COLORS[0], DEPTH_COLORS[2]), strict=True):
        _line(axes[1], series, name, phase, color)
    _markers(axes[1], series, names.VALIDATION_TIME, "a validation", DEPTH_COLORS[3])
    _markers(axes[1], series, names.SAVE_TIME, "waiting for saves", DEPTH_COLORS[4])
    axes[1].set_ylabel("seconds")
    for name in memory:
        _line(axes[2], series, name, "resident, rank 0" if name == names.MEMORY_RSS else "peak on device, rank 0", MAIN_COLOR)
        axes[2].set_ylabel("memory (GiB)")
    for ax in axes:
        _from_zero(ax)
    return _finished(figure, axes, series)


DRAWINGS = {"loss": draw_loss, "accuracy": draw_accuracy, "optimizer": draw_optimizer, "speed": draw_speed}


def _canvas(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    heights = 5.0 if panels == 1 else 3.0 * panels
    figure, axes = plt.subplots(panels, 1, figsize=(9, heights), sharex=True, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure, list(axes[:, 0])


def _line(ax: Axes, series: Series, name: str, label: str, color: str, *, dashed: bool = False, smooth: bool = True) -> None:
    x, y = series.curve(name)
    if not len(x):
        return
    style = "--" if dashed else "-"
    if smooth and len(x) >= SMOOTH_FROM:
        ax.plot(x, y, style, color=color, alpha=0.18, linewidth=0.8)
        width = max(5, len(x) // 40)
        y = running_mean(y, width)
    # One point makes no line: show it as a dot.
    ax.plot(x, y, style, color=color, label=label, linewidth=1.6, marker="." if len(x) == 1 else None)


def _markers(ax: Axes, series: Series, name: str, label: str, color: str) -> None:
    x, y = series.curve(name)
    if len(x):
        ax.plot(x, y, "o", color=color, label=label, markersize=6, markerfacecolor="white", markeredgewidth=1.6, zorder=3)


def _from_zero(ax: Axes) -> None:
    """A y axis that starts at zero and leaves air above a level curve."""
    top = max((np.nanmax(line.get_ydata()) for line in ax.lines if np.isfinite(line.get_ydata()).any()), default=0.0)
    ax.set_ylim(0, top * 1.1 if top > 0 else 1.0)


def _finished(figure: Figure, axes: Iterable[Axes], series: Series, *, legend: bool = True) -> Figure:
    axes = list(axes)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel(series.label)
        ax.tick_params(labelbottom=True)
        _mark_starts(ax, series)
        if (legend or series.resumed or series.stopped) and ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _mark_starts(ax: Axes, series: Series) -> None:
    """Vertical lines where the run was resumed, and where it rests."""
    for number, place in enumerate(series.position(np.array(sorted(set(series.resumed)), float))):
        ax.axvline(place, color=START_COLOR, linestyle=":", linewidth=1.4, label="stopped and resumed" if not number else None)
    if series.stopped is not None:
        place = series.position(np.array([series.stopped], float))[0]
        ax.axvline(place, color=START_COLOR, linestyle="-", linewidth=1.4, label="stopped here")
