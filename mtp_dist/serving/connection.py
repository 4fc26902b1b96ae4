"""One client's connection, on uvicorn's h11 protocol, with a time for everything that a client may be slow at: a request's
header, the silence between two requests, taking the answer, and hanging up. (A body's time is the application's.)

A connection that is closed while its client still sends stays half open for a moment and reads on: else the kernel would answer
what comes with a reset, and the client might lose the answer that says why.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mtp_dist.serving.request import RequestError

LINGER_SECONDS = 1.0
"""For a client to read the end and hang up."""
WAITING_BYTES = 1 << 15
"""Of an answer, beyond what the kernel holds, before who writes it has to wait."""
LEAST_BYTES = 1 << 14
"""That a client has to take in its time for taking any."""
PIECE = 4096
REASONS = {
    400: "this is not an HTTP request",
    431: "the header is longer than this server takes",
    501: "this transfer encoding is not served; send a body with a length, or chunked",
}


@dataclass(frozen=True)
class Times:
    """Seconds that a client has: for a request's header, between two requests, for taking some of an answer that waits."""

    header: float
    idle: float
    write: float


class Transport:
    """A socket's transport as uvicorn uses it, of which ``close`` leaves time to read, and then ends in any case."""

    def __init__(self, transport: asyncio.Transport, times: Times) -> None:
        self.transport, self.times = transport, times
        self.closing = False
        self.checked, self.deadline = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def is_closing(self) -> bool:
        return self.closing or self.transport.is_closing()

    def write(self, content: bytes) -> None:
        """Nothing after the end."""
        if not self.is_closing():
            self.transport.write(content)

    def close(self) -> None:
        """Send what is left and the end, then wait for the client's."""
        if self.is_closing():
            return
        self.closing = True
        loop = asyncio.get_running_loop()
        with suppress(OSError, RuntimeError):
            self.transport.write_eof()
            # What the client sends is dropped.
            self.transport.resume_reading()
        self.checked = self.transport.get_write_buffer_size()
        self.deadline = loop.time() + self.times.write * (1 + self.checked / LEAST_BYTES)
        loop.call_later(LINGER_SECONDS, self._check)

    def _check(self) -> None:
        left, loop = self.transport.get_write_buffer_size(), asyncio.get_running_loop()
        if (left == 0 and self.checked == 0) or loop.time() > self.deadline:
            self.transport.abort()
            return
        self.checked = left
        loop.call_later(LINGER_SECONDS, self._check)


class Connection(H11Protocol):
    """``gone`` is called once, when it is over."""

    def __init__(self, *, times: Times, gone: Callable[[], object], **shared: Any) -> None:
        super().__init__(**shared)
        self.app_state = {**self.app_state, "abort": self.abort}
        self.times, self.gone = times, gone
        self.waiting_for = ""
        self.timer: asyncio.TimerHandle | None = None
        self.stalled: asyncio.TimerHandle | None = None
        self.unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=WAITING_BYTES)
        super().connection_made(Transport(transport, self.times))  # type: ignore[arg-type]
        self._await("header", self.times.header)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await("")
        self._stop_stalled()
        super().connection_lost(exc)
        self.gone()

    def data_received(self, data: bytes) -> None:
        # In pieces, since h11 measures what it still lacks the end of: a whole header of any length would pass at once.
        for start in range(0, len(data), PIECE):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + PIECE])
        self._unset_keepalive_if_required()
        self._follow("header", self.times.header)

    def eof_received(self) -> None:
        """The client has gone, as far as anyone can tell: asyncio closes once what is left is written, which may be never."""
        self.loop.call_later(self.times.write, self.transport.abort)

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            # A refusal before the body's end: what is left of it is not wanted.
            self.transport.close()
        super().on_response_complete()
        self._unset_keepalive_if_required()
        partial, _ = self.conn.trailing_data
        self._follow("header", self.times.header) if partial else self._follow("idle", self.times.idle)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_stalled()
        self.unsent = self.transport.get_write_buffer_size()
        self.stalled = self.loop.call_later(self.times.write, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stalled()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, for what h11 does not take; in this server's shape, and with the status that h11 names."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        self._refuse(RequestError(status, REASONS.get(status, REASONS[400])))

    def shutdown(self) -> None:
        """Asked to go: at once if nothing is being answered."""
        if self._answering():
            self.cycle.keep_alive = False
        else:
            self._close()

    def abort(self) -> None:
        """Drop the connection, with what is being answered."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.abort()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _follow(self, kind: str, seconds: float) -> None:
        """The time for what is awaited now; one that runs goes on."""
        if self._answering() or self.transport.is_closing():
            self._await("")
        elif kind != self.waiting_for:
            self._await(kind, seconds)

    def _await(self, kind: str, seconds: float = 0.0) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.waiting_for = kind
        self.timer = self.loop.call_later(seconds, self._late) if kind else None

    def _late(self) -> None:
        partial, _ = self.conn.trailing_data
        if self.waiting_for == "idle" or not partial:
            self._close()
            return
        message = f"the request's header took longer than the {self.times.header:g} seconds that it may take"
        self._refuse(RequestError(408, message, code="timeout"))

    def _refuse(self, error: RequestError) -> None:
        """Answer outside the application, and close."""
        answering = self._answering()
        if answering and self.cycle.response_started:
            self.abort()
            return
        if answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(error.as_dict()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with suppress(h11.LocalProtocolError):
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _close(self) -> None:
        with suppress(h11.LocalProtocolError):
            self.conn.send(h11.ConnectionClosed())
        self.transport.close()

    def _stalled(self) -> None:
        """A slow client may go on; one that takes next to nothing may not."""
        left = self.transport.get_write_buffer_size()
        if left > self.unsent - LEAST_BYTES:
            self.abort()
            return
        self.unsent, self.stalled = left, self.loop.call_later(self.times.write, self._stalled)

    def _stop_stalled(self) -> None:
        if self.stalled is not None:
            self.stalled.cancel()
            self.stalled = None


class Refused(asyncio.Protocol):
    """A connection too many: told so, whatever it asks."""

    def __init__(self, most: int, times: Times, gone: Callable[[], object]) -> None:
        message = f"{most} connections are open, the most that this server keeps; try again later"
        error = RequestError(503, message, code="connections")
        body = json.dumps(error.as_dict()).encode()
        head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.answer = f"{head}connection: close\r\nretry-after: 1\r\n\r\n".encode() + body
        self.times, self.gone = times, gone

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        closing = Transport(transport, self.times)
        closing.write(self.answer)
        closing.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone()
