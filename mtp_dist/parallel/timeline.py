"""What one rank does within a step, and when: the recorder, the waits between its computations, and the pipeline's bubble.

A ``Timeline`` is handed to what it shall record and taken away again; where there is none (None), nothing is measured. On the CPU
a time is ``time.perf_counter_ns``, one clock for all processes of a host. On CUDA it is an event on the current stream, read
only after the step, so that recording adds no wait for the device: a computation is timed where it runs, not where it is queued.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

COMPUTATIONS = {"F": "forward_one_chunk", "B": "backward_one_chunk", "W": "backward_weight_one_chunk"}
"""What a stage computes, and the method of torch's ``PipelineStage`` that does it. B includes the weight gradients where a
schedule has no W of its own."""

SCHEDULE = "schedule"


@dataclass(frozen=True)
class Span:
    """From `begin` to `end` (ns). kind: F, B, W, receive, send, exchange, reduce, optimizer, or ``SCHEDULE`` around the first
    five. `received`: its input came from another rank."""

    kind: str
    begin: int
    end: int
    chunk: int | None = None
    micro_batch: int | None = None
    received: bool = False


class Timeline:
    """Records the spans of this rank from now on; see ``span`` and ``watched``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: list[tuple[Any, Any, Span]] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._anchor = self._mark()
        self.began = time.perf_counter_ns()

    def _mark(self) -> Any:
        """Now: ns, or on CUDA an event whose time is known once the device has reached it."""
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _time(self, mark: Any) -> int:
        if self.device.type != "cuda":
            return int(mark)
        return self.began + round(self._anchor.elapsed_time(mark) * 1e6)

    @contextmanager
    def record(
        self, kind: str, chunk: int | None = None, micro_batch: int | None = None, received: bool = False
    ) -> Iterator[None]:
        """A span around the body; the arguments are those of ``Span``."""
        begin = self._mark()
        yield
        self._open.append((begin, self._mark(), Span(kind, 0, 0, chunk, micro_batch, received)))

    def spans(self) -> list[Span]:
        """All that was recorded, by time, the waits of the schedule included. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        closed = [replace(span, begin=self._time(begin), end=self._time(end)) for begin, end, span in self._open]
        return with_waits(sorted(closed, key=lambda span: (span.begin, -span.end)))


def span(
    timeline: Timeline | None, kind: str, chunk: int | None = None, micro_batch: int | None = None, received: bool = False
) -> AbstractContextManager[None]:
    """A span around the body if there is a timeline."""
    return nullcontext() if timeline is None else timeline.record(kind, chunk, micro_batch, received)


def watched(timeline: Timeline | None, stages: Sequence[Any]) -> AbstractContextManager[None]:
    """Around a schedule: records what it computes on these stages of torch, if there is a timeline."""
    return nullcontext() if timeline is None else _watching(timeline, stages)


@contextmanager
def _watching(timeline: Timeline, stages: Sequence[Any]) -> Iterator[None]:
    """The methods are covered on the instances and uncovered again, so that an unrecorded step runs torch's own."""
    for stage in stages:
        for kind, method in COMPUTATIONS.items():
            setattr(stage, method, _timed(timeline, kind, stage, getattr(stage, method)))
    try:
        with timeline.record(SCHEDULE):
            yield
    finally:
        for stage in stages:
            for method in COMPUTATIONS.values():
                delattr(stage, method)


def _timed(timeline: Timeline, kind: str, stage: Any, compute: Any) -> Any:
    source = stage.stage_index + {"F": -1, "B": 1, "W": 0}[kind]
    received = stage.stage_index_to_group_rank.get(source, stage.group_rank) != stage.group_rank

    def timed(micro_batch: int, *args: Any, **kwargs: Any) -> Any:
        with timeline.record(kind, stage.stage_index, micro_batch, received):
            return compute(micro_batch, *args, **kwargs)

    return timed


def with_waits(spans: Sequence[Span]) -> list[Span]:
    """The spans by time, with what lies between the computations of the schedule put in, and the schedule's own span left out.

    A gap before a computation whose input came from another rank is `receive` and bears its numbers; any other one is `send`:
    earlier messages were on their way. Gaps hold the handling of messages as well as the waiting. Nothing is said of the time
    before the first computation unless it waited for its input.
    """
    schedule = next((one for one in spans if one.kind == SCHEDULE), None)
    if schedule is None:
        return list(spans)
    inside = [one for one in spans if one is not schedule and schedule.begin <= one.begin and one.end <= schedule.end]
    outside = [one for one in spans if one.begin < schedule.begin or one.end > schedule.end]
    waits: list[Span] = []
    before = schedule.begin
    for one in inside:
        if before < one.begin and one.received:
            waits.append(Span("receive", before, one.begin, one.chunk, one.micro_batch))
        elif before < one.begin and one is not inside[0]:
            waits.append(Span("send", before, one.begin))
        before = one.end
    if inside and before < schedule.end:
        waits.append(Span("send", before, schedule.end))
    return sorted([*inside, *outside, *waits], key=lambda one: one.begin)


def bubbles(ranks: Sequence[Sequence[Span]]) -> list[float]:
    """For each rank of one pipeline, the share of the schedule in which it computed nothing: 1 - busy / window.

    The window is the pipeline's: from the first computation of any of its ranks to the end of the last. Times of all ranks are
    on one clock. 0.0 where nothing was computed.
    """
    busy = [[one for one in spans if one.kind in COMPUTATIONS] for spans in ranks]
    every = [one for spans in busy for one in spans]
    if not every:
        return [0.0] * len(busy)
    window = max(one.end for one in every) - min(one.begin for one in every)
    return [1 - sum(one.end - one.begin for one in spans) / window for spans in busy]
