"""What the thread promises beside texts: a failure is the failing texts' own; and settings that cannot be served are one line."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from mtp_dist import serve
from mtp_dist.config.schema import DecodeConfig, Serving
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.decoding.engine import Failed, Growing, NewText, Waiting, grow
from mtp_dist.decoding.stopping import StopStrings
from mtp_dist.errors import UserError
from mtp_dist.serving import answer
from mtp_dist.serving.worker import CLOSED, FAILED, ClosedError, FullError, Piece, Text, Worker
from tests.decoding.models import random_model

NOTHING = StopStrings(byte_tokenizer(), [])


class Client:
    """Hears a text's pieces, and notes what was decoded together."""

    def __init__(self, **settings: Any) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()
        fields: dict[str, Any] = {"index": 0, "prompt": [1, 2, 3], "limit": 6, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
        self.text = Text(**{**fields, **settings}, seed=1, stops=NOTHING, heard=self.hear)

    def hear(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.ending:
            self.ended.set()

    def result(self) -> tuple[str, int]:
        assert self.ended.wait(100)
        return self.pieces[-1].ending, sum(len(piece.tokens) for piece in self.pieces)


class Decoder:
    """The engine on a random model; fails where a batch begins with a prompt of 13. Remembers what began together, and at which
    temperature; may be held up before it begins, and after each forward."""

    def __init__(self) -> None:
        self.model, self.batches, self.free = random_model(1), [], threading.Event()
        self.forwards, self.running = threading.Semaphore(0), 0
        self.step_by_step = False

    def __call__(self, waiting: Waiting, config: DecodeConfig, *, rows: int, failed: Failed) -> Iterator[list[Growing]]:
        def watched(free: int) -> Sequence[NewText]:
            new = waiting(free)
            assert len(new) <= free
            if new:
                self.batches.append((len(new), config.temperature))
                assert self.free.wait(100)
                if new[0].prompt[0] == 13:
                    raise RuntimeError("thirteen")
            return new

        for growing in grow(self.model, watched, config, rows=rows, longest=40, failed=failed):
            yield growing
            assert not self.step_by_step or self.forwards.acquire(timeout=100)


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def worker(decoder: Decoder) -> Iterator[Worker]:
    found = Worker(decoder, DecodeConfig(batch=3), 6, torch.device("cpu"))
    found.start()
    yield found
    decoder.free.set()
    found.close()
    assert not found.thread.is_alive()


def test_texts_of_one_kind_go_together(worker: Worker, decoder: Decoder) -> None:
    """The oldest first, and its like from anywhere behind it; never more than the batch."""
    first = Client()
    worker.submit([first.text])
    while not decoder.batches:
        pass
    clients = [Client(temperature=temperature) for temperature in (0.7, 0.0, 0.7, 0.0, 0.0, 0.0)]
    for client in clients:
        worker.submit([client.text])
    assert worker.counts() == (1, 6)
    with pytest.raises(FullError):
        worker.submit([Client().text])
    decoder.free.set()
    assert all(client.result() == ("length", 6) for client in (first, *clients))
    assert decoder.batches == [(1, 0.0), (2, 0.7), (3, 0.0), (1, 0.0)]


def until(done: Callable[[], bool]) -> None:
    """Something that another thread does soon."""
    end = time.monotonic() + 100
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_text_that_comes_later_joins(worker: Worker, decoder: Decoder) -> None:
    """While others go on, as soon as a place is free; and one that joined can be dropped."""
    decoder.step_by_step = True
    decoder.free.set()
    long, short, dropped, next_ = Client(limit=30), Client(limit=3), Client(limit=30), Client(limit=4, prompt=[4])
    worker.submit([long.text])
    until(lambda: len(long.pieces) == 1)
    worker.submit([short.text, dropped.text, next_.text])
    decoder.forwards.release(3)  # a round of the first, the prompts of two, a round of all
    until(lambda: len(short.pieces) == 2 and len(dropped.pieces) == 2)
    assert decoder.batches == [(1, 0.0), (2, 0.0)]
    assert worker.counts() == (3, 1)
    worker.drop([dropped.text])
    heard = len(dropped.pieces)
    decoder.step_by_step = False
    decoder.forwards.release()
    assert short.result() == ("length", 3) and next_.result() == ("length", 4) and long.result() == ("length", 30)
    assert len(dropped.pieces) == heard
    assert [count for count, _ in decoder.batches] == [1, 2, 1]
    until(lambda: worker.counts() == (0, 0))


def test_texts_of_another_kind_get_their_turn(worker: Worker, decoder: Decoder) -> None:
    """However many of the first kind still come: those behind one of another kind wait until the batch has ended."""
    decoder.step_by_step = True
    decoder.free.set()
    first, second, other = Client(limit=30), Client(limit=2), Client(temperature=0.7)
    worker.submit([first.text])
    until(lambda: len(first.pieces) == 1)
    late = [Client(limit=2) for _ in range(3)]
    worker.submit([second.text, other.text, *(client.text for client in late)])
    decoder.step_by_step = False
    decoder.forwards.release()
    assert all(client.result()[0] == "length" for client in (first, second, other, *late))
    assert decoder.batches == [(1, 0.0), (1, 0.0), (1, 0.7), (3, 0.0)]


def test_a_failure_is_not_the_next_texts(worker: Worker, decoder: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    decoder.free.set()
    for prompt, ending in (([13], FAILED), ([1], "length"), ([13], FAILED), ([2], "length")):
        client = Client(prompt=prompt)
        worker.submit([client.text])
        assert client.result()[0] == ending
    assert capsys.readouterr().err.count("RuntimeError: thirteen") == 2


def test_a_prompt_that_cannot_be_run_fails_alone(
    worker: Worker, decoder: Decoder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that are being written go on, as does who comes next."""

    def full(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].shape[1] > 10:
            raise RuntimeError("no memory")

    decoder.model.layers["0"].register_forward_pre_hook(full)
    decoder.step_by_step = True
    decoder.free.set()
    long, wrong, next_ = Client(limit=30), Client(prompt=[3] * 20), Client(prompt=[4])
    worker.submit([long.text])
    until(lambda: len(long.pieces) == 1)
    worker.submit([wrong.text])
    decoder.forwards.release(2)  # a round of the first; after the failure another one
    assert wrong.result() == (FAILED, 0)
    assert not long.ended.is_set()
    worker.submit([next_.text])
    decoder.step_by_step = False
    decoder.forwards.release()
    assert long.result() == ("length", 30) and next_.result() == ("length", 6)
    assert decoder.batches == [(1, 0.0)] * 3
    assert capsys.readouterr().err.count("RuntimeError: no memory") == 1


def test_who_is_dropped_hears_nothing(worker: Worker, decoder: Decoder) -> None:
    running, waiting, other = Client(), Client(temperature=1.0), Client(temperature=1.0)
    worker.submit([running.text])
    while not decoder.batches:
        pass
    worker.submit([waiting.text, other.text])
    worker.drop([running.text, waiting.text])
    assert worker.counts() == (1, 1)
    decoder.free.set()
    assert other.result() == ("length", 6)
    assert decoder.batches == [(1, 0.0), (1, 1.0)]
    assert not running.pieces and not waiting.pieces


def test_closing_tells_everyone(worker: Worker, decoder: Decoder) -> None:
    running, waiting = Client(), Client(temperature=1.0)
    worker.submit([running.text])
    while not decoder.batches:
        pass
    worker.submit([waiting.text])
    threading.Timer(0, lambda: (waiting.ended.wait(100), decoder.free.set())).start()
    worker.close()
    assert running.result() == waiting.result() == (CLOSED, 0)
    assert worker.counts() == (0, 0)
    with pytest.raises(ClosedError):
        worker.submit([Client().text])


def test_reasons() -> None:
    assert [answer.choice(0, "", ending)["finish_reason"] for ending in ("length", "stop_string", "end_of_document", "")] == [
        "length", "stop", "stop", None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"checkpoint": ""}, "checkpoint is empty; give it: checkpoint=RUN_FOLDER"),
        ({"port": 70000}, "port=70000 must be a whole number from 0 to 65535"),
        ({"longest": 1}, "longest=1 must be a whole number from 2"),
        ({"waiting": 0}, "waiting=0 must be a whole number from 1"),
        ({"seconds": 0.0}, "seconds=0.0 must be a number from 0.001"),
        ({"seconds": float("nan")}, "seconds=nan must be a number from 0.001"),
        ({"decode": DecodeConfig(mode="both")}, "decode.mode=both compares"),
        ({"decode": DecodeConfig(temperature=3.0)}, "decode.temperature=3.0 must be from 0 to 2"),
    ],
)
def test_settings_that_cannot_be_served(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        serve.validate(Serving(**{"checkpoint": "somewhere", **settings}))
    assert str(error.value).startswith(says)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "LIBRARIES", ("starlette", "an_absent_library"))
    with pytest.raises(UserError, match=r"an_absent_library is not installed.*bash launch/install.sh serve"):
        serve.validate(Serving(checkpoint="somewhere"))


def test_an_address_that_cannot_be_had(worker: Worker) -> None:
    from mtp_dist.serving.server import address, bound

    with bound("127.0.0.1", 0) as first:
        first.listen()
        port = int(address(first).rpartition(":")[2])
        with pytest.raises(UserError, match=rf"host=127.0.0.1 port={port} cannot be had: .*port=0 for a free one"):
            bound("127.0.0.1", port)
