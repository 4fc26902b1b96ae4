"""The recorded timelines of all ranks as one file for Perfetto (ui.perfetto.dev) or chrome://tracing, and as a picture.

Format: the Chrome trace event format, JSON, complete events ("ph": "X"), times in microseconds from the first span; one track
(tid) a rank. Ranks of one host share a clock, so their times are comparable as they are. Clocks of different hosts are laid over
each other at a barrier that all ranks passed just before the recording: a difference between hosts is as exact as that barrier is
short, some network round trips (tens to hundreds of microseconds).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtp_dist.parallel.timeline import COMPUTATIONS, Span, bubbles


@dataclass(frozen=True)
class Track:
    """What one rank recorded. `host`: ranks with the same one share a clock; `aligned`: ns on it, just after the barrier."""

    rank: int
    pipeline_rank: int
    data_rank: int
    tensor_rank: int
    host: str
    aligned: int
    spans: list[Span]

    @property
    def title(self) -> str:
        return f"rank {self.rank} (pipeline {self.pipeline_rank}, data {self.data_rank}, tensor {self.tensor_rank})"


def on_one_clock(tracks: Sequence[Track]) -> list[Track]:
    """Tracks by rank whose times all begin at 0, the first span of any."""
    ordered = sorted(tracks, key=lambda track: track.rank)
    zero: dict[str, int] = {}
    for track in ordered:
        zero.setdefault(track.host, track.aligned)
    first = min((span.begin - zero[track.host] for track in ordered for span in track.spans), default=0)
    return [_moved(track, -zero[track.host] - first) for track in ordered]


def _moved(track: Track, by: int) -> Track:
    return replace(track, spans=[replace(span, begin=span.begin + by, end=span.end + by) for span in track.spans])


def bubble_of_ranks(tracks: Sequence[Track]) -> dict[int, float]:
    """rank -> its bubble, within its own pipeline (``bubbles``). Tracks are on one clock."""
    found: dict[int, float] = {}
    for key in {(track.data_rank, track.tensor_rank) for track in tracks}:
        members = [track for track in tracks if (track.data_rank, track.tensor_rank) == key]
        shares = bubbles([track.spans for track in members])
        found |= {track.rank: share for track, share in zip(members, shares, strict=True)}
    return dict(sorted(found.items()))


def mean_bubble(tracks: Sequence[Track]) -> float:
    """Mean over ranks."""
    found = bubble_of_ranks(tracks)
    return sum(found.values()) / len(found)


def trace_document(step: int, tracks: Sequence[Track]) -> dict[str, Any]:
    """The trace of tracks on one clock, ready for ``json.dump``. `otherData` holds the bubble by rank and its mean."""
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"step {step}"}}]
    for track in tracks:
        events.append({"ph": "M", "pid": 0, "tid": track.rank, "name": "thread_name", "args": {"name": track.title}})
        events.append({"ph": "M", "pid": 0, "tid": track.rank, "name": "thread_sort_index", "args": {"sort_index": track.rank}})
        events += [_event(track.rank, span) for span in track.spans]
    bubble = {"mean": mean_bubble(tracks), "ranks": {str(rank): share for rank, share in bubble_of_ranks(tracks).items()}}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"step": step, "bubble": bubble}}


def _event(rank: int, span: Span) -> dict[str, Any]:
    name = f"{span.kind} {span.micro_batch}" if span.kind in COMPUTATIONS else span.kind
    numbers = {"chunk": span.chunk, "micro_batch": span.micro_batch}
    return {
        "ph": "X",
        "pid": 0,
        "tid": rank,
        "name": name,
        "cat": span.kind,
        "ts": span.begin / 1e3,
        "dur": (span.end - span.begin) / 1e3,
        "args": {key: number for key, number in numbers.items() if number is not None},
    }


def write_trace(folder: Path, step: int, tracks: Sequence[Track]) -> Path:
    """folder/step_N.json and folder/step_N.png of tracks on one clock; returns the JSON's path."""
    # Here, since drawing is rare and its import takes most of a second.
    from mtp_dist.tracking.timeline_plot import draw_timeline

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step}.json"
    path.write_text(json.dumps(trace_document(step, tracks)), encoding="utf-8")
    draw_timeline(step, tracks, bubble_of_ranks(tracks)).savefig(path.with_suffix(".png"), dpi=120)
    return path
