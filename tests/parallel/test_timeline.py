"""Promise: the recorded step is told as it was: waits lie between computations, the bubble is what no rank of it computed in,
hosts are laid over each other at the barrier, and the files can be read."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch

from mtp_dist.parallel.timeline import SCHEDULE, Span, Timeline, bubbles, span, watched, with_waits
from mtp_dist.tracking.trace_file import Track, bubble_of_ranks, mean_bubble, on_one_clock, trace_document, write_trace

MS = 1_000_000


def computed(kind: str, begin: int, end: int, chunk: int = 0, micro_batch: int = 0, received: bool = False) -> Span:
    return Span(kind, begin * MS, end * MS, chunk, micro_batch, received)


def two_ranks(start: tuple[int, int] = (0, 0), hosts: tuple[str, str] = ("a", "a")) -> list[Track]:
    """One micro-batch through two stages, F 10 ms and B 20 ms each; rank r's clock begins at start[r] ms."""
    first = [computed("F", 0, 10), computed("B", 40, 60)]
    second = [computed("F", 10, 20, 1), computed("B", 20, 40, 1)]
    spans = [
        [Span(s.kind, s.begin + at * MS, s.end + at * MS, s.chunk, s.micro_batch) for s in row]
        for row, at in zip((first, second), start, strict=True)
    ]
    return [Track(r, r, 0, 0, hosts[r], start[r] * MS, spans[r]) for r in range(2)]


def test_bubble_is_the_share_of_the_pipelines_window_without_computation() -> None:
    waits = [Span("receive", 10 * MS, 40 * MS, 0, 0), Span("optimizer", 60 * MS, 500 * MS)]
    first, second = (track.spans for track in two_ranks())
    assert bubbles([first + waits, second]) == [pytest.approx(0.5), pytest.approx(0.5)]
    assert bubbles([first]) == [pytest.approx(0.5)]
    assert bubbles([[computed("F", 0, 10), computed("B", 10, 30), computed("W", 30, 35)]]) == [0.0]
    assert bubbles([[], []]) == [0.0, 0.0]


def test_each_pipeline_has_its_own_window() -> None:
    """A second replica that began later and was never idle does not stretch the first one's window."""
    alone = Track(2, 0, 1, 0, "a", 0, [computed("F", 100, 300)])
    tracks = on_one_clock([alone, *two_ranks()])
    assert bubble_of_ranks(tracks) == {0: pytest.approx(0.5), 1: pytest.approx(0.5), 2: 0.0}
    assert mean_bubble(tracks) == pytest.approx(1 / 3)


def test_gaps_of_the_schedule_become_waits() -> None:
    spans = [
        Span("exchange", 0, 5),
        Span(SCHEDULE, 5, 100),
        Span("F", 10, 20, 0, 0),
        Span("F", 20, 30, 0, 1),
        Span("B", 50, 60, 0, 0, received=True),
        Span("W", 65, 75, 0, 0),
        Span("reduce", 100, 120),
    ]
    assert [(one.kind, one.begin, one.end) for one in with_waits(spans)] == [
        ("exchange", 0, 5),
        ("F", 10, 20),
        ("F", 20, 30),
        ("receive", 30, 50),
        ("B", 50, 60),
        ("send", 60, 65),
        ("W", 65, 75),
        ("send", 75, 100),
        ("reduce", 100, 120),
    ]


def test_a_first_computation_that_waited_for_its_input_says_so() -> None:
    spans = [Span(SCHEDULE, 0, 30), Span("F", 20, 30, 1, 0, received=True)]
    assert with_waits(spans)[0] == Span("receive", 0, 20, 1, 0)


def test_hosts_are_aligned_at_the_barrier_and_one_host_is_left_as_it_is() -> None:
    apart = on_one_clock(two_ranks(start=(7000, 3), hosts=("a", "b")))
    assert [track.spans for track in apart] == [track.spans for track in two_ranks()]
    # On one host the barrier's skew must not move anything: rank 1 left it 2 ms later.
    late = two_ranks()
    late[1] = Track(1, 1, 0, 0, "a", 2 * MS, late[1].spans)
    assert [track.spans for track in on_one_clock(late)] == [track.spans for track in two_ranks()]


def test_the_trace_loads_with_one_track_a_rank_and_times_in_microseconds(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace", 3, two_ranks())
    assert path.name == "step_3.json"
    document = json.loads(path.read_text())
    assert document == trace_document(3, two_ranks())
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [(e["tid"], e["name"], e["ts"], e["dur"]) for e in events] == [
        (0, "F 0", 0.0, 10_000.0),
        (0, "B 0", 40_000.0, 20_000.0),
        (1, "F 0", 10_000.0, 10_000.0),
        (1, "B 0", 20_000.0, 20_000.0),
    ]
    assert events[2]["args"] == {"chunk": 1, "micro_batch": 0}
    titles = {e["tid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert titles == {0: "rank 0 (pipeline 0, data 0, tensor 0)", 1: "rank 1 (pipeline 1, data 0, tensor 0)"}
    assert document["otherData"]["bubble"] == {"mean": pytest.approx(0.5), "ranks": {"0": 0.5, "1": 0.5}}


def test_the_picture_shows_every_computation_in_its_colour(tmp_path: Path) -> None:
    write_trace(tmp_path, 3, two_ranks())
    picture = matplotlib.image.imread(tmp_path / "step_3.png")
    rows, columns = picture.shape[:2]
    assert columns > 1000
    for colour in ((0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)):
        here = (abs(picture[..., :3] * 255 - torch.tensor(colour).numpy()) < 1.5).all(-1)
        assert here.sum() > rows * columns / 100


class Stage:
    """What ``watched`` reads of torch's stages, with computations that note their calls."""

    def __init__(self) -> None:
        self.stage_index, self.group_rank = 1, 0
        self.stage_index_to_group_rank = {0: 1, 1: 0, 2: 0}
        self.calls: list[tuple[object, ...]] = []

    def forward_one_chunk(self, micro_batch: int, argument: str, *, option: int) -> str:
        self.calls.append((micro_batch, argument, option))
        return "output"

    def backward_one_chunk(self, micro_batch: int) -> None:
        self.calls.append((micro_batch,))

    def backward_weight_one_chunk(self, micro_batch: int) -> None:
        self.calls.append((micro_batch,))


def test_a_watched_stage_computes_the_same_and_is_left_as_it_was() -> None:
    stage, timeline = Stage(), Timeline(torch.device("cpu"))
    with watched(timeline, [stage]):
        assert stage.forward_one_chunk(4, "input", option=2) == "output"
        stage.backward_one_chunk(4)
        stage.backward_weight_one_chunk(4)
    assert stage.calls == [(4, "input", 2), (4,), (4,)]
    assert vars(stage).keys() == vars(Stage()).keys()
    recorded = [(one.kind, one.chunk, one.micro_batch, one.received) for one in timeline.spans() if one.chunk is not None]
    assert ("F", 1, 4, True) in recorded
    assert ("B", 1, 4, False) in recorded
    assert ("W", 1, 4, False) in recorded


def test_without_a_timeline_nothing_is_covered() -> None:
    stage = Stage()
    with watched(None, [stage]), span(None, "reduce"):
        assert vars(stage).keys() == vars(Stage()).keys()
