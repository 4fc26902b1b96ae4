"""A picture of a recorded step: one row a rank, time from left to right, micro-batch numbers in the computations."""

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mtp_dist.parallel.timeline import COMPUTATIONS
from mtp_dist.tracking.trace_file import Track

COLORS = {
    "F": "#56b4e9",
    "B": "#e69f00",
    "W": "#009e73",
    "receive": "#e4e4e4",
    "send": "#bdbdbd",
    "exchange": "#f0e442",
    "reduce": "#cc79a7",
    "optimizer": "#7a5195",
}
NAMES = {"F": "forward", "B": "backward", "W": "weight gradients", "receive": "waits for input", "send": "waits to send"}
# A number is written where it fits: into a bar of at least this share of the width.
NUMBERED = 0.008


def draw_timeline(step: int, tracks: Sequence[Track], bubble: dict[int, float]) -> Figure:
    """Tracks on one clock, and each rank's bubble, which stands at its row. Chunks of a rank after its first are
    hatched."""
    figure = Figure(figsize=(16, 1.6 + 0.62 * len(tracks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    end = max((span.end for track in tracks for span in track.spans), default=1) / 1e6
    seen: set[str] = set()
    for row, track in enumerate(tracks):
        lowest = min((span.chunk for span in track.spans if span.kind in COMPUTATIONS and span.chunk is not None), default=None)
        for span in track.spans:
            seen.add(span.kind)
            begin, width = span.begin / 1e6, (span.end - span.begin) / 1e6
            computes = span.kind in COMPUTATIONS
            axes.broken_barh(
                [(begin, width)],
                (row - (0.4 if computes else 0.2), 0.8 if computes else 0.4),
                facecolor=COLORS[span.kind],
                edgecolor="white" if computes else "none",
                linewidth=0.3,
                hatch="///" if computes and span.chunk != lowest else None,
            )
            if computes and width >= NUMBERED * end:
                axes.text(begin + width / 2, row, str(span.micro_batch), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(tracks)), [f"rank {track.rank}\nbubble {bubble[track.rank]:.1%}" for track in tracks])
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel("milliseconds")
    axes.set_title(f"Step {step}: mean bubble {sum(bubble.values()) / len(bubble):.1%}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(facecolor=color, label=NAMES.get(kind, kind)) for kind, color in COLORS.items() if kind in seen]
    if any(span.chunk for track in tracks for span in track.spans):
        handles.append(Patch(facecolor="white", edgecolor="#7a7a7a", hatch="///", label="a later chunk of the rank"))
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
