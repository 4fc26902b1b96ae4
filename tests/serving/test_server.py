"""Real servers on loopback, real HTTP: texts are those of ``generate_batch``, every wrong request is one clear error, and whoever
hangs up or takes too long leaves nothing behind."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import DecodeConfig, MTPConfig
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.decoding.engine import Generated, NewText, generate_batch
from mtp_dist.decoding.stopping import StopStrings
from mtp_dist.model.chunk import Chunk
from tests.decoding.models import random_model, taught
from tests.decoding.test_generate import SENTENCE, save

VOCABULARY, END = 257, 256
JSON = {"Content-Type": "application/json"}
HALF = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
)
ROOM, BATCH, BODY_KIB = 40, 4, 16
ENDLESS = 90_000
"""Tokens that take minutes."""
PATIENT = [f"waiting={ROOM}", f"decode.batch={BATCH}", f"body_kib={BODY_KIB}", "longest=100000", "seconds=500", "patience=100"]
HASTY = ["seconds=4", "patience=0", "longest=100000", "decode.drafter=ngram", "decode.auto=true"]


@dataclass
class Running:
    """A server's process."""

    process: subprocess.Popen
    port: int = 0

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON; a body that is no bytes is sent as JSON."""
        with closing(self.connect()) as connection:
            sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, sent, headers or JSON)
            response = connection.getresponse()
            assert response.headers["content-type"] == "application/json"
            return response.status, json.loads(response.read())

    def complete(self, **fields: Any) -> Any:
        status, content = self.call("POST", "/v1/completions", fields)
        assert status == 200, content
        return content

    @contextmanager
    def events(self, **fields: Any) -> "Iterator[Iterator[Any]]":
        """The contents of a stream's events, as they come. Leaving hangs up."""
        with closing(self.connect()) as connection:
            connection.request("POST", "/v1/completions", json.dumps({"stream": True, **fields}), JSON)
            response = connection.getresponse()
            assert response.status == 200
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = (line.decode().rstrip("\n") for line in response)
            yield (line.removeprefix("data: ") for line in lines if line)

    def stream(self, **fields: Any) -> list[Any]:
        with self.events(**fields) as events:
            *contents, last = events
        assert last == "[DONE]"
        return [json.loads(content) for content in contents]

    def counts(self) -> tuple[int, int]:
        status, content = self.call("GET", "/health")
        assert status == 200 and content["status"] == "ok"
        return content["running"], content["waiting"]

    def until(self, holds: Callable[[tuple[int, int]], bool]) -> None:
        """Wait for counts that come by themselves, if they come."""
        for _ in range(1000):
            if holds(self.counts()):
                return
            time.sleep(0.05)
        raise AssertionError(f"still (running, waiting) = {self.counts()}")

    def held(self, what: str) -> int:
        """Threads (task) or files and sockets (fd) of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/{what}"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chunk = taught(random_model(2, std=0.02, vocabulary=VOCABULARY + 7), list(SENTENCE.encode()), steps=60)
    return save(tmp_path_factory.mktemp("served") / "fox" / "checkpoints" / "step_00000060", chunk, MTPConfig(depth=2))


@pytest.fixture(scope="module")
def servers(checkpoint: Path) -> Iterator[dict[str, Running]]:
    """Both started at once, since a start is mostly loading libraries."""
    command = [sys.executable, "-m", "mtp_dist.serve", f"checkpoint={checkpoint}", "port=0", "decode.threads=1"]
    found = {
        name: Running(subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        for name, settings in (("patient", PATIENT), ("hasty", HASTY))
    }
    try:
        for server in found.values():
            assert server.process.stdout is not None
            line = server.process.stdout.readline()
            assert line.startswith("serving fox (step 60, float32) at http://127.0.0.1:"), line
            server.port = int(line.rpartition(":")[2].removesuffix("/v1\n"))
        yield found
    finally:
        for server in found.values():
            server.process.kill()
            server.process.communicate()


@pytest.fixture
def patient(servers: dict[str, Running]) -> Iterator[Running]:
    """Idle before and after."""
    yield servers["patient"]
    servers["patient"].until(lambda counts: counts == (0, 0))


@pytest.fixture(scope="module")
def solo(checkpoint: Path) -> Callable[..., tuple[str, Generated]]:
    model, tokenizer = Checkpoint(checkpoint).load_model(), byte_tokenizer()
    return lambda prompt, tokens, *stop, **settings: alone(model, tokenizer, prompt, tokens, stop, settings)


def alone(model: Chunk, tokenizer: Any, prompt: str, tokens: int, stop: tuple, settings: dict) -> tuple[str, Generated]:
    """What the engine writes for one prompt, and its text. A seed of sampling may be among the settings."""
    generator = torch.Generator().manual_seed(settings.pop("seed", 0))
    stops = StopStrings(tokenizer, stop)
    config = DecodeConfig(max_new_tokens=tokens, **settings)
    ids = tokenizer.encode(prompt).ids
    new = NewText(ids, tokens, stops, generator)
    (found,) = generate_batch(model, [new], config, end=END, vocabulary=VOCABULARY)
    return stops.cut(tokenizer.decode(found.tokens, skip_special_tokens=True)), found


Solo = Callable[..., tuple[str, Generated]]
PROMPTS = ["fox jump", "gray", "x", "nothing known", "ed gray fox j", "λ = 'jumped'"]


def test_texts_are_the_engines(patient: Running, solo: Solo) -> None:
    for prompt in PROMPTS:
        expected, found = solo(prompt, 40)
        content = patient.complete(prompt=prompt, max_tokens=40, model="fox")
        (choice,) = content["choices"]
        assert choice == {"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}
        assert content["object"] == "text_completion" and content["model"] == "fox" and content["id"].startswith("cmpl-")
        length, accepted = len(prompt.encode()), sum(found.statistics.accepted)
        assert content["usage"] == {
            "prompt_tokens": length,
            "completion_tokens": 40,
            "total_tokens": length + 40,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(found.statistics.drafted) - accepted,
            },
        }


def test_several_texts_of_a_request(patient: Running, solo: Solo) -> None:
    """Strings or tokens, stop strings, echo."""
    expected = [solo(prompt, 30, "gray", "mp")[0] for prompt in PROMPTS]
    for prompts in (PROMPTS, [list(prompt.encode()) for prompt in PROMPTS]):
        choices = patient.complete(prompt=prompts, max_tokens=30, stop=["gray", "mp"])["choices"]
        assert [choice["text"] for choice in choices] == expected
        assert [choice["index"] for choice in choices] == list(range(len(PROMPTS)))
    assert {choice["finish_reason"] for choice in choices} == {"stop", "length"}
    (choice,) = patient.complete(prompt=list(b"fox jump"), max_tokens=5, echo=True)["choices"]
    assert choice["text"] == "fox jump" + solo("fox jump", 5)[0]


def test_half_a_character_at_the_end_of_a_prompt_of_tokens(patient: Running, solo: Solo) -> None:
    """What follows it tells whether it becomes a whole one; whole answer and stream agree."""
    for prompt in ([*b"fox", 0xC3], [*b"fox", 0xE6, 0x97], [0xFF, *b"fox"]):
        for echo in (False, True):
            fields = {"prompt": prompt, "max_tokens": 9, "echo": echo}
            (choice,) = patient.complete(**fields)["choices"]
            assert "".join(event["choices"][0]["text"] for event in patient.stream(**fields)) == choice["text"]
            assert "fox\ufffd" in choice["text"] or prompt[0] == 0xFF or not echo


def test_a_seed_is_a_text(patient: Running, solo: Solo) -> None:
    settings = {"temperature": 2.0, "top_p": 0.99, "top_k": 8}
    texts = [patient.complete(prompt="fox", max_tokens=30, seed=seed, **settings)["choices"][0]["text"] for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    assert texts[:2] == [solo("fox", 30, seed=seed, **settings)[0] for seed in (1, 2)]
    assert len({patient.complete(prompt="fox", max_tokens=30, **settings)["choices"][0]["text"] for _ in range(3)}) == 3


def test_pieces_of_a_stream_join_to_the_text(patient: Running, solo: Solo) -> None:
    *events, last = patient.stream(prompt=PROMPTS, max_tokens=30, stop="gray", stream_options={"include_usage": True}, echo=True)
    assert len({event["id"] for event in events}) == 1 and len(events) > 2 * len(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        expected, found = solo(prompt, 30, "gray")
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == prompt + expected
        reasons = [piece["finish_reason"] for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + ["stop" if found.ending == "stop_string" else "length"]
    assert last["choices"] == [] and last["usage"]["prompt_tokens"] == sum(len(prompt.encode()) for prompt in PROMPTS)
    assert "usage" not in events[-1]


def test_many_at_once(patient: Running, solo: Solo) -> None:
    """24 requests by 8 clients, streamed or not, of different lengths and ends, with sampled ones in between: each greedy text is
    its solo text."""

    def ask(number: int) -> tuple[int, str]:
        fields: dict[str, Any] = {"prompt": PROMPTS[number % 6], "max_tokens": 5 + 3 * number}
        fields |= {"stop": ["umped g"]} if number % 4 == 1 else {}
        fields |= {"temperature": 0.8} if number % 5 == 0 else {}
        if number % 2:
            return number, "".join(event["choices"][0]["text"] for event in patient.stream(**fields))
        return number, patient.complete(**fields)["choices"][0]["text"]

    with ThreadPoolExecutor(8) as clients:
        texts = dict(clients.map(ask, range(24)))
    for number in range(24):
        if number % 5:
            stop = ["umped g"] if number % 4 == 1 else []
            assert texts[number] == solo(PROMPTS[number % 6], 5 + 3 * number, *stop)[0]


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        (b'{"prompt": "a"', 400, None, "the body is not JSON"),
        (b'{"prompt": "\xff"}', 400, None, "UTF"),
        (b"[" * 10_000, 400, None, "nested too deep"),
        (b"7", 400, None, "the body is 7; send a JSON object"),
        ({}, 400, "prompt", "prompt is missing"),
        ({"prompt": ""}, 400, "prompt", "prompt is empty"),
        ({"prompt": ["a", ""]}, 400, "prompt", "prompt[1] is empty"),
        ({"prompt": [1, "a"]}, 400, "prompt", "prompt[0]=1 must be a string or a list of tokens"),
        ({"prompt": [3, VOCABULARY]}, 400, "prompt", f"token {VOCABULARY}; tokens are from 0 to {VOCABULARY - 1}"),
        ({"prompt": [True]}, 400, "prompt", "prompt[0]=true must be"),
        ({"prompt": ["a"] * (ROOM + 1)}, 400, "prompt", f"{ROOM + 1} texts; this server takes at most {ROOM}"),
        ({"prompt": "a \ud800"}, 400, "prompt", "half a character (\\ud800) at place 2"),
        ({"prompt": "a" * 11_000, "max_tokens": 90_000}, 400, "prompt", "has 11000 tokens and max_tokens=90000 may follow"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens=0 must be a whole number from 1 to 100000"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", "max_tokens=1.5 must be a whole number"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "temperature=hot must be 0, or a number from 0.0001 to 2"),
        ({"prompt": "a", "temperature": True}, 400, "temperature", "temperature=true must be 0, or a number from 0.0001 to 2"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature", "must be 0, or a number from 0.0001 to 2"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p", "must be a number from 1e-6 to 1"),
        ({"prompt": "a", "seed": -1}, 400, "seed", "seed=-1 must be a whole number from 0 to"),
        ({"prompt": "a", "stop": ["b", ""]}, 400, "stop", "must be a string of 1 to 256 characters"),
        ({"prompt": "a", "stop": ["b"] * 17}, 400, "stop", "a list of at most 16 strings"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream", "stream=yes must be true or false"),
        ({"prompt": "a", "n": 2}, 400, "n", "n=2 is not served here; leave it out, or give null or 1"),
        ({"prompt": "a", "n": True}, 400, "n", "n=true is not served here"),
        ({"prompt": "a", "logprobs": 5}, 400, "logprobs", "logprobs=5 is not served here"),
        ({"prompt": "a", "a\ud800": 1}, 400, '"a\\ud800"', "unknown field"),
        ({"prompt": ["a", "\udcff"]}, 400, "prompt[1]", "half a character (\\udcff) at place 0"),
        (b'{"prompt": "a", "stop": "\xed\xa0\x80"}', 400, "stop", "half a character (\\ud800) at place 0"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature", "unknown field temprature"),
        ({"prompt": "a", "model": "gpt"}, 404, "model", "model=gpt is not served here; there is fox"),
        ({"prompt": "a" * BODY_KIB * 1024}, 413, None, f"this server takes at most {BODY_KIB * 1024}"),
    ],
)
def test_wrong_requests(patient: Running, body: Any, status: int, param: str | None, says: str) -> None:
    found, content = patient.call("POST", "/v1/completions", body)
    error = content["error"]
    assert (found, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert says in error["message"] and "\n" not in error["message"]


def test_neutral_values_of_what_is_not_served(patient: Running, solo: Solo) -> None:
    fields = {"n": 1, "best_of": 1, "logprobs": None, "suffix": None, "logit_bias": {}, "presence_penalty": 0.0, "user": "me",
              "seed": None, "stop": None, "temperature": None, "model": None, "stream": None, "echo": None}  # fmt: skip
    assert patient.complete(prompt="gray", max_tokens=9, **fields)["choices"][0]["text"] == solo("gray", 9)[0]
    # Nothing is said about the length: decode.max_new_tokens.
    assert patient.complete(prompt="gray")["usage"]["completion_tokens"] == DecodeConfig().max_new_tokens


def test_paths_and_methods(patient: Running) -> None:
    status, content = patient.call("GET", "/v1/models")
    assert status == 200 and [model["id"] for model in content["data"]] == ["fox"]
    for method, path, expected, says in (
        ("GET", "/v1/completions", 405, "allowed is POST"),
        ("POST", "/health", 405, "POST /health is not allowed"),
        ("POST", "/v1/chat/completions", 404, "there are POST /v1/completions, GET /v1/models and GET /health"),
        ("GET", "/v1/models/", 404, "GET /v1/models/ is not served"),
    ):
        status, content = patient.call(method, path)
        assert status == expected and says in content["error"]["message"]


def test_a_body_without_a_stated_length_is_bounded(patient: Running) -> None:
    with closing(patient.connect()) as connection:
        parts = (b" " * 1024 for _ in range(BODY_KIB + 1))
        connection.request("POST", "/v1/completions", parts, JSON, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 413 and "more than" in json.loads(response.read())["error"]["message"]


def test_who_hangs_up_leaves_nothing(patient: Running, solo: Solo) -> None:
    """Streaming or not, running or waiting, again and again: places, threads and sockets are free afterwards."""
    threads = files = 0
    for _ in range(8):
        with patient.events(prompt="x", max_tokens=ENDLESS) as events:
            assert "choices" in json.loads(next(events))
            assert patient.counts() == (1, 0)
        patient.until(lambda counts: counts == (0, 0))
        with closing(patient.connect()) as connection:
            prompts = ["x"] * (2 * BATCH)
            connection.request("POST", "/v1/completions", json.dumps({"prompt": prompts, "max_tokens": ENDLESS}), JSON)
            patient.until(lambda counts: counts == (BATCH, BATCH))
        patient.until(lambda counts: counts == (0, 0))
        threads, files = threads or patient.held("task"), files or patient.held("fd")
    assert patient.held("task") <= threads + 1
    assert patient.held("fd") <= files + 2  # calls of the moment
    with socket.create_connection(("127.0.0.1", patient.port)) as half:
        half.sendall(HALF)
    assert patient.complete(prompt="gray", max_tokens=20)["choices"][0]["text"] == solo("gray", 20)[0]


def test_a_full_queue(patient: Running, solo: Solo) -> None:
    with patient.events(prompt=["x"] * BATCH, max_tokens=ENDLESS) as running:
        next(running)
        with closing(patient.connect()) as connection:
            connection.request("POST", "/v1/completions", json.dumps({"prompt": ["x"] * ROOM, "max_tokens": ENDLESS}), JSON)
            patient.until(lambda counts: counts == (BATCH, ROOM))
            for stream in (False, True):
                status, content = patient.call("POST", "/v1/completions", {"prompt": "x", "stream": stream})
                assert status == 429 and content["error"]["type"] == "rate_limit_error"
                assert f"the {ROOM} texts that may wait here" in content["error"]["message"]
    patient.until(lambda counts: counts == (0, 0))
    assert patient.complete(prompt="gray", max_tokens=20)["choices"][0]["text"] == solo("gray", 20)[0]


def test_a_request_that_takes_too_long(servers: dict[str, Running], solo: Solo) -> None:
    """Streamed, waiting behind that one, and one whose body never ends; all at once."""
    hasty = servers["hasty"]

    def slow() -> bytes:
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=100) as connection:
            connection.sendall(HALF)
            return connection.recv(20)

    with ThreadPoolExecutor(1) as clients, hasty.events(prompt="x", max_tokens=ENDLESS) as events:
        half = clients.submit(slow)
        assert json.loads(next(events))["choices"]
        status, content = hasty.call("POST", "/v1/completions", {"prompt": "x", "max_tokens": ENDLESS})
        assert status == 504 and "the 4 seconds that it may take" in content["error"]["message"]
        *pieces, last = [json.loads(event) for event in events]
        assert all(piece["choices"] for piece in pieces) and last["error"]["code"] == "timeout"
        assert half.result().startswith(b"HTTP/1.1 504 ")
    hasty.until(lambda counts: counts == (0, 0))
    assert hasty.complete(prompt="gray", max_tokens=3)["choices"][0]["text"] == solo("gray", 3)[0]


def test_sigterm_ends_what_runs_after_its_patience(servers: dict[str, Running]) -> None:
    hasty = servers["hasty"]
    with hasty.events(prompt="x", max_tokens=ENDLESS) as events:
        next(events)
        hasty.process.send_signal(signal.SIGTERM)
        last = json.loads(list(events)[-1])
    assert last["error"]["code"] == "closing"
    assert hasty.process.wait(60) == 0


def test_sigterm_lets_what_runs_finish(servers: dict[str, Running], solo: Solo) -> None:
    """Comes last: the server is gone then. Nobody new gets in."""
    patient = servers["patient"]
    with patient.events(prompt="x", max_tokens=800) as events:
        texts = [json.loads(next(events))["choices"][0]["text"]]
        patient.process.send_signal(signal.SIGTERM)
        *contents, done = events
    assert done == "[DONE]"
    texts += [json.loads(content)["choices"][0]["text"] for content in contents]
    assert "".join(texts) == solo("x", 800)[0]
    assert patient.process.wait(60) == 0
    with pytest.raises(ConnectionRefusedError):
        patient.counts()
    for server in servers.values():
        assert server.process.stderr is not None
        notes = server.process.stderr.read().splitlines()
        assert all(line.startswith("note: ") for line in notes), notes
