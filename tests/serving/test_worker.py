"""What the thread promises beside texts: a failure is the failing texts' own; and settings that cannot be served are one line."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mtp_dist import serve
from mtp_dist.config.schema import DecodeConfig, Serving
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.decoding.engine import Growing, grow
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
    """The engine on a random model; fails where the first prompt begins with 13. Remembers its batches; may be held up."""

    def __init__(self) -> None:
        self.model, self.batches, self.free = random_model(1), [], threading.Event()

    def __call__(self, prompts: Any, config: DecodeConfig, **settings: Any) -> Iterator[list[Growing]]:
        self.batches.append((len(prompts), config.temperature))
        assert self.free.wait(100)
        if prompts[0][0] == 13:
            raise RuntimeError("thirteen")
        return grow(self.model, prompts, config, **settings)


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


def test_a_failure_is_not_the_next_texts(worker: Worker, decoder: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    decoder.free.set()
    for prompt, ending in (([13], FAILED), ([1], "length"), ([13], FAILED), ([2], "length")):
        client = Client(prompt=prompt)
        worker.submit([client.text])
        assert client.result()[0] == ending
    assert capsys.readouterr().err.count("RuntimeError: thirteen") == 2


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
        ({"port": 70000}, "port=70000 must be from 0 to 65535"),
        ({"longest": 1}, "longest=1 must be at least 2"),
        ({"waiting": 0}, "waiting=0 must be at least 1"),
        ({"seconds": 0.0}, "seconds=0.0 must be greater than 0"),
        ({"seconds": float("nan")}, "seconds=nan must be a finite number"),
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
