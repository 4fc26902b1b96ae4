"""Promise: however a client behaves, others are served, memory stays bounded, and its own connection ends; and a page of the web
can neither start work nor read an answer. Real sockets against a real server's process."""

import json
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config.compose import compose
from mtp_dist.config.schema import MTPConfig, Serving
from mtp_dist.errors import UserError
from mtp_dist.serve import validate
from mtp_dist.serving.access import Access
from mtp_dist.serving.request import RequestError
from mtp_dist.serving.server import allow_descriptors
from tests.decoding.models import random_model
from tests.decoding.test_generate import save
from tests.serving.test_server import Running

MOST = 24
SETTINGS = [
    f"connections={MOST}",
    "header_seconds=1.5",
    "body_seconds=1.5",
    "idle_seconds=1.5",
    "write_seconds=1.5",
    "patience=0",
    "longest=100000",
    "waiting=64",
    "body_kib=256",
    "hosts=[model.example,'*.inside.example']",
    "origins=[http://localhost:3000]",
    "seconds=60",
    "decode.batch=4",
]
HOST = b"Host: localhost\r\n"
TYPE = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Nothing it prints is more than a line, at the end of all."""
    folder = tmp_path_factory.mktemp("connections")
    checkpoint = save(folder / "run" / "checkpoints" / "step_00000001", random_model(2, vocabulary=257 + 7), MTPConfig(depth=2))
    with (folder / "errors").open("w+") as errors:
        command = [sys.executable, "-m", "mtp_dist.serve", f"checkpoint={checkpoint}", "port=0", "decode.threads=1", *SETTINGS]
        running = Running(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True))
        try:
            assert running.process.stdout is not None
            running.port = int(running.process.stdout.readline().rpartition(":")[2].removesuffix("/v1\n"))
            yield running
            assert running.process.poll() is None
        finally:
            running.process.kill()
            running.process.communicate()
        errors.seek(0)
        lines = errors.read().splitlines()
        assert all(line.startswith(("note: ", "warning: no connection can be accepted")) for line in lines), lines


@pytest.fixture(autouse=True)
def idle(server: Running) -> Iterator[None]:
    """Before and after each test nothing runs, and it is served."""
    server.until(lambda counts: counts == (0, 0))
    yield
    server.until(lambda counts: counts == (0, 0))


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def ended(connection: socket.socket) -> bytes:
    """What comes until the server hangs up. Raises TimeoutError if it does not."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def answers(server: Running, sent: bytes) -> list[tuple[int, dict[str, str], Any]]:
    """(status, headers, JSON) of each answer to what is sent over one connection."""
    with connect(server) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR) if b"HTTP/0" in sent else None
        return parsed(ended(connection))


def parsed(raw: bytes) -> list[tuple[int, dict[str, str], Any]]:
    found = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", len(raw)))
        body, raw = raw[:length], raw[length:]
        found.append((int(first.split()[1]), headers, json.loads(body) if body else None))
    return found


def one(server: Running, sent: bytes) -> tuple[int, dict[str, str], Any]:
    (found,) = answers(server, sent)
    return found


def post(body: bytes, *headers: bytes, host: bytes = HOST, kind: bytes = TYPE) -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST /v1/completions HTTP/1.1\r\n" + host + kind + length + b"".join(headers) + b"Connection: close\r\n\r\n" + body


def get(*headers: bytes, path: bytes = b"/health", host: bytes = HOST, method: bytes = b"GET") -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\n" + host + b"".join(headers) + b"Connection: close\r\n\r\n"


SMALL = json.dumps({"prompt": "x", "max_tokens": 2}).encode()


BEGUN: list[tuple[bytes, list[int]]] = [
    (b"", []),
    (b"GET", [408]),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b", [408]),
    (b"\r\n", [400]),
    (b"POST /v1/completions HTTP/1.1\r\n" + HOST + TYPE + b"Content-Length: 100\r\n\r\n{", [408]),
    (b"POST /v1/completions HTTP/1.1\r\n" + HOST + TYPE + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n{", [408]),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\nab", [200]),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n", [200]),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"\r\nGET /hea", [200, 408]),
]


def test_what_is_begun_and_not_ended_is_closed(server: Running) -> None:
    """Also when a byte comes now and then: the time is for the whole. Silent connections get no answer."""
    with ThreadPoolExecutor(len(BEGUN)) as clients:
        found = list(clients.map(lambda case: trickled(server, case[0]), BEGUN))
    assert [[answer[0] for answer in parsed(raw)] for raw in found] == [statuses for _, statuses in BEGUN]


def trickled(server: Running, begun: bytes) -> bytes:
    """What comes until the server hangs up on a client that sends a byte now and then. Raises TimeoutError."""
    found, idle = b"", begun in (b"", BEGUN[7][0])
    with connect(server) as connection:
        connection.sendall(begun)
        connection.settimeout(0.2)
        for _ in range(300):
            try:
                part = connection.recv(65536)
                if not part:
                    return found
                found += part
            except TimeoutError:
                if not idle:
                    with suppress(OSError):
                        connection.sendall(b"a")
            except ConnectionResetError:
                return found
    raise TimeoutError(found)


def served_again(server: Running) -> None:
    """Places are free as soon as the server has noticed who has gone."""
    for _ in range(600):
        if one(server, get())[0] == 200:
            return
        time.sleep(0.05)
    raise AssertionError("still 503")


def test_forty_half_requests_leave_nothing_and_shut_nobody_out(server: Running) -> None:
    held = server.held("fd")
    with ExitStack() as stack:
        halves = [stack.enter_context(connect(server)) for _ in range(40)]
        for number, half in enumerate(halves):
            half.sendall(b"GET /health HTTP/1.1\r\nHost: loc" if number % 2 else b"POST /v1/completions HTTP/1.1\r\nContent-")
        statuses = [[answer[0] for answer in parsed(ended(half))] for half in halves]
        # A connection of the check before may still have been there.
        assert MOST - 2 <= statuses.count([408]) <= MOST and statuses.count([503]) == 40 - statuses.count([408])
    served_again(server)
    assert server.held("fd") <= held + 2


def test_one_connection_too_many_is_told_so(server: Running) -> None:
    with ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(connect(server))
        status, headers, content = one(server, get())
        assert status == 503 and headers["retry-after"] == "1" and content["error"]["code"] == "connections"
        assert f"{MOST} connections are open" in content["error"]["message"]
    served_again(server)


def test_without_descriptors_it_waits_and_says_so_once(server: Running, tmp_path: Path) -> None:
    """The limit of the running process is lowered to what it holds; connections that came meanwhile are served afterwards."""
    pid = server.process.pid
    errors = Path(os.readlink(f"/proc/{pid}/fd/2"))
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    numbers = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = next(number for number in range(1000) if number not in numbers)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        with ThreadPoolExecutor(8) as clients:
            found = [clients.submit(answers, server, get()) for _ in range(8)]
            while "no connection can be accepted" not in errors.read_text():
                assert not any(future.done() for future in found)
                time.sleep(0.05)
            ticks = Path(f"/proc/{pid}/stat").read_text().split()[13:15]
            time.sleep(1.0)
            used = sum(map(int, Path(f"/proc/{pid}/stat").read_text().split()[13:15])) - sum(map(int, ticks))
            assert used < 0.5 * os.sysconf("SC_CLK_TCK")
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            assert [future.result()[0][0] for future in found] == [200] * 8
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert errors.read_text().count("no connection can be accepted") == 1


def test_who_reads_nothing_is_cut_off(server: Running) -> None:
    """Streams of which nothing is read: others are served meanwhile, and their places come free long before their texts' end."""
    stream = json.dumps({"prompt": "x", "max_tokens": 90_000, "stream": True}).encode()
    with ExitStack() as stack:
        for _ in range(3):
            silent = stack.enter_context(socket.socket())
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            silent.connect(("127.0.0.1", server.port))
            silent.sendall(post(stream, b"X-Much: y\r\n"))
        assert one(server, get())[0] == 200
        server.until(lambda counts: counts == (0, 0))
        assert one(server, post(SMALL))[0] == 200


def test_who_resets_leaves_nothing(server: Running) -> None:
    held = server.held("fd")
    for sent in (
        b"",
        b"GET /h",
        post(SMALL),
        post(json.dumps({"prompt": "x", "max_tokens": 90_000, "stream": True}).encode()),
    ) * 5:
        with closing(connect(server)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(sent)
    server.until(lambda counts: counts == (0, 0))
    assert server.held("fd") <= held + 2


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200),
        (b"LOCALHOST:1", 200),
        (b"localhost.", 200),
        (b"127.0.0.1:8000", 200),
        (b"127.9.9.9", 200),
        (b"[::1]:8000", 200),
        (b"model.example", 200),
        (b"Model.Example:443", 200),
        (b"a.inside.example", 200),
        (b"evil.example", 421),
        (b"evil.example:8000", 421),
        (b"localhost.evil.example", 421),
        (b"inside.example", 421),
        (b"xinside.example", 421),
        (b"127.0.0.1.evil.example", 421),
        (b"10.0.0.1", 421),
        (b"0.0.0.0", 421),
        (b"[::2]", 421),
        (b"2130706433", 421),
        (b"localhost:99999", 400),
        (b"localhost:80@evil", 400),
        (b"a b", 400),
        (b"", 400),
        (b"localhost, evil.example", 400),
        (b"\xe9", 400),
    ],
)
def test_hosts(server: Running, host: bytes, status: int) -> None:
    for request in (get(host=b"Host: " + host + b"\r\n"), post(SMALL, host=b"Host: " + host + b"\r\n")):
        found, headers, content = one(server, request)
        assert found == status
        assert headers["content-type"] == "application/json" and ("error" in content) == (status != 200)


def test_no_or_two_hosts(server: Running) -> None:
    assert one(server, get(host=b""))[0] == 400
    assert one(server, get(host=HOST + b"Host: evil.example\r\n"))[0] == 400
    assert one(server, b"GET /health HTTP/1.0\r\n\r\n")[0] == 200
    assert one(server, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n")[0] == 421


def test_the_address_that_a_connection_came_in_at_is_ours() -> None:
    """As where host=0.0.0.0 listens at every address."""
    access = Access()
    access.check_host("10.0.0.7:80", "10.0.0.7")
    access.check_host("10.0.0.7", "::ffff:10.0.0.7")
    access.check_host("[FE80::1]", "fe80::1%eth0")
    with pytest.raises(RequestError, match="not served here"):
        access.check_host("10.0.0.8", "10.0.0.7")
    Access(hosts=("*",), origins=("*",)).check_host("anything", "10.0.0.7")


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (b"http://localhost:3000", True),
        (b"HTTP://LOCALHOST:3000", True),
        (b"http://localhost", True),
        (b"https://localhost:443", False),
        (b"http://localhost:3001", False),
        (b"https://localhost:3000", False),
        (b"http://evil.example", False),
        (b"null", False),
        (b"", False),
        (b"http://localhost:3000.evil.example", False),
        (b"http://localhost:3000/", False),
        (b"file://", False),
        (b"\xff", False),
    ],
)
def test_origins(server: Running, origin: bytes, allowed: bool) -> None:
    """Same origin, allowed, and refused; with CORS exactly where it is allowed."""
    sent = b"Origin: " + origin + b"\r\n"
    for request in (get(sent), post(SMALL, sent), get(sent, path=b"/nowhere"), post(b"{", sent)):
        status, headers, content = one(server, request)
        assert (status != 403) == allowed
        assert headers.get("access-control-allow-origin", "").encode() == (origin if allowed else b"")
        assert allowed == (headers.get("vary") == "Origin") and ("error" in content or allowed)
    status, headers, _ = one(
        server, get(sent, b"Access-Control-Request-Method: POST\r\n", method=b"OPTIONS", path=b"/v1/completions")
    )
    assert (status, "access-control-allow-methods" in headers) == ((204, True) if allowed else (403, False))


def test_a_preflight_names_what_is_allowed(server: Running) -> None:
    ask = [
        b"Origin: http://localhost:3000\r\n",
        b"Access-Control-Request-Method: POST\r\n",
        b"Access-Control-Request-Headers: content-type, authorization,x-stainless-os\r\n",
        b"Access-Control-Request-Private-Network: true\r\n",
    ]
    status, headers, content = one(server, get(*ask, method=b"OPTIONS", path=b"/v1/completions"))
    assert status == 204 and content is None
    assert headers["access-control-allow-origin"] == "http://localhost:3000"
    assert headers["access-control-allow-methods"] == "POST, OPTIONS"
    assert headers["access-control-allow-headers"] == "content-type, authorization,x-stainless-os"
    assert headers["access-control-allow-private-network"] == "true" and int(headers["access-control-max-age"]) > 0
    assert one(server, get(*ask, method=b"OPTIONS", path=b"/nowhere"))[0] in (404, 405)


def test_a_stream_to_an_allowed_page(server: Running) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 3, "stream": True}).encode()
    with connect(server) as connection:
        connection.sendall(post(body, b"Origin: http://localhost:3000\r\n"))
        head, _, rest = ended(connection).partition(b"\r\n\r\n")
    assert b"access-control-allow-origin: http://localhost:3000" in head.lower() and b"[DONE]" in rest


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (b"application/json", 200),
        (b"Application/JSON; charset=UTF-8", 200),
        (b'application/json;charset="utf-8"', 200),
        (b"text/plain", 415),
        (b"application/x-www-form-urlencoded", 415),
        (b"multipart/form-data; boundary=x", 415),
        (None, 415),
        (b"", 415),
        (b"text/plain, application/json", 415),
        (b"application/json, text/plain", 415),
        (b"application/json; charset=latin-1", 415),
        (b"application/jsonp", 415),
    ],
)
def test_json_only(server: Running, kind: bytes | None, status: int) -> None:
    found, _, content = one(server, post(SMALL, kind=b"" if kind is None else b"Content-Type: " + kind + b"\r\n"))
    assert found == status and (status == 200 or "content-type: application/json" in content["error"]["message"])
    assert one(server, post(SMALL, b"Content-Encoding: gzip\r\n"))[0] == 415


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (get(method=b"HEAD"), [200]),
        (get(method=b"HEAD", path=b"/v1/completions"), [405]),
        (get(method=b"OPTIONS"), [204]),
        (get(method=b"OPTIONS", path=b"*"), [204]),
        (get(method=b"DELETE"), [405]),
        (get(method=b"BREW"), [405]),
        (get(method=b"TRACE", path=b"/v1/completions"), [405]),
        (get(method=b"CONNECT", path=b"evil.example:443"), [404]),
        (get(path=b"http://localhost/health"), [404]),
        (get(b"Upgrade: websocket\r\n").replace(b"Connection: close", b"Connection: upgrade, close"), [200]),
        (get(method=b"G(T"), [400]),
        (b"GET /health\r\n\r\n", [400]),
        (b"GET /health HTTP/9.9\r\n\r\n", [505]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), [400]),
        (get(b"Bad header\r\n"), [400]),
        (get(b"A: " + b"x" * 100_000 + b"\r\n"), [431]),
        (get(*(b"A%d: b\r\n" % n for n in range(20_000))), [431]),
        (get(path=b"/" + b"x" * 100_000), [431]),
        (post(SMALL).replace(b"Content-Length: ", b"Content-Length: -"), [400]),
        (post(SMALL).replace(b"Content-Length: ", b"Content-Length: 1" + b"0" * 30), [400]),
        (post(SMALL, b"Content-Length: 3\r\n"), [400]),
        (post(SMALL, b"Transfer-Encoding: gzip, chunked\r\n"), [501]),
        (post(b"", b"Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b"") + b"zz\r\n", [400]),
        (
            post(b"", b"Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b"") + b"fffffffffffffffffffffff\r\n",
            [400],
        ),
        (post(b"x" * 300_000), [413]),
        (post(b"", b"Expect: 100-continue\r\n").replace(b"Content-Length: 0", b"Content-Length: 9999999"), [413]),
        (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [200]),
        (get().replace(b"Connection: close\r\n", b"") * 30 + get(path=b"/nowhere") + get(), [200] * 30 + [404]),
        (post(SMALL).replace(b"Connection: close\r\n", b"") * 3 + get(), [200] * 4),
    ],
)
def test_every_request_has_its_answer(server: Running, sent: bytes, statuses: list[int]) -> None:
    """One for each, in order, errors as JSON, whatever is in a request; then the connection is closed."""
    with connect(server) as connection:
        connection.sendall(sent)
        raw = ended(connection)
    if sent.startswith(b"HEAD"):
        head, _, body = raw.partition(b"\r\n\r\n")
        assert int(head.split()[1]) == statuses[0] and body == b""
        return
    found = parsed(raw)
    assert [answer[0] for answer in found] == statuses
    for status, headers, content in found:
        assert status == 204 or (headers["content-type"] == "application/json" and ("error" in content) == (status != 200))
        assert status not in (204, 405) or headers["allow"]


def test_a_long_body_in_chunks_has_its_answer_while_it_is_sent(server: Running) -> None:
    """The client sends without end and only reads then: the answer is there, not a reset."""
    with connect(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + HOST + TYPE + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(280):
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert [answer[0] for answer in parsed(ended(connection))] == [413]


def test_an_old_client_gets_its_stream(server: Running) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 3, "stream": True}).encode()
    with connect(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.0\r\n" + TYPE + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        head, _, rest = ended(connection).partition(b"\r\n\r\n")
    assert b"chunked" not in head and rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["connections=0"], "connections=0 must be a whole number from 1"),
        (["header_seconds=0"], "header_seconds=0"),
        (["idle_seconds=nan"], "idle_seconds=nan"),
        (["hosts=[http://here]"], "hosts=http://here is no name or address"),
        (["hosts=['here:80']"], "hosts=here:80 is no name or address"),
        (["origins=[localhost]"], "origins=localhost is no origin"),
        (["origins=['http://localhost:3000/']"], "origins=http://localhost:3000/ is no origin"),
    ],
)
def test_wrong_settings_are_named(settings: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        validate(compose("serve", Serving, ["checkpoint=x", *settings]))
    assert says in str(error.value)


def test_connections_beyond_the_systems_limit_are_refused() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        pytest.skip("no limit here")
    with pytest.raises(UserError, match=f"connections={hard} needs {hard + 128} open files"):
        allow_descriptors(hard)
