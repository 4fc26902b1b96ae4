"""The HTTP side: three paths, OpenAI's shapes, errors as JSON. On Starlette; its event loop never waits for the model.

A request's texts go to the ``Worker``; its pieces come back through a queue of the event loop. However a request ends (answered,
out of time, its client gone) its texts are dropped, so that it leaves nothing behind.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from tokenizers import Tokenizer

from mtp_dist.data.encoder import TextEncoder
from mtp_dist.decoding.statistics import Statistics
from mtp_dist.decoding.stopping import StopStrings, TextStream
from mtp_dist.errors import UserError
from mtp_dist.quantity import counted
from mtp_dist.serving import answer
from mtp_dist.serving.access import Access, Gate, check_json
from mtp_dist.serving.request import Asked, RequestError, Served, read
from mtp_dist.serving.worker import CLOSED, FAILED, ClosedError, FullError, Piece, Text, Worker

SENDING_SECONDS = 1.0
"""For the last event to a client that may read no more."""


@dataclass(frozen=True)
class Service:
    """What is served, within which limits. seconds: a request's, from its first byte to its answer's last; body: its bytes;
    body_seconds: from the first byte to the last of these."""

    served: Served
    tokenizer: Tokenizer
    encoder: TextEncoder
    worker: Worker
    seconds: float
    body: int
    body_seconds: float
    access: Access


METHODS = {"/v1/completions": ("POST",), "/v1/models": ("GET", "HEAD"), "/health": ("GET", "HEAD")}


def application(service: Service) -> ASGIApp:
    """Everything under one roof; the worker has been started."""
    created = int(time.time())

    async def models(_: Request) -> Response:
        return JSONResponse(answer.models(service.served.name, created))

    async def health(_: Request) -> Response:
        running, waiting = service.worker.counts()
        return JSONResponse({"status": "ok", "model": service.served.name, "running": running, "waiting": waiting})

    routes = [
        Route("/v1/completions", Completions(service), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    handlers: Any = {HTTPException: _unknown, RequestError: _refused, Exception: _broken}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, service.access, METHODS)


class Completions:
    """``POST /v1/completions``, as an ASGI application of its own: it has to notice that a client has gone."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = asyncio.get_running_loop().time()
        deadline = now + self.service.seconds
        check_json(scope)
        request = Request(scope, receive)
        try:
            async with asyncio.timeout_at(min(deadline, now + self.service.body_seconds)):
                body = await self._body(request)
        except ClientDisconnect:
            return
        except TimeoutError:
            if self.service.body_seconds >= self.service.seconds:
                raise self._late() from None
            message = f"the body took longer than the {self.service.body_seconds:g} seconds that it may take"
            raise RequestError(408, message, code="timeout") from None
        # A long text takes a while to be cut into tokens.
        asked = await asyncio.to_thread(read, body, self.service.served, self._encode)
        await _attended(self._answer(asked, deadline, send, scope), receive)

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        most, length = self.service.body, request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise RequestError(413, f"the body has {length} bytes; this server takes at most {most}")
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise RequestError(413, f"the body has more than {most} bytes, the most that this server takes")
        return bytes(body)

    async def _answer(self, asked: Asked, deadline: float, send: Send, scope: Scope) -> None:
        stops = StopStrings(self.service.tokenizer, asked.stop)
        async with aclosing(self._pieces(asked, stops)) as pieces:
            if asked.stream:
                await self._events(asked, stops, pieces, deadline, send, scope)
                return
            try:
                async with asyncio.timeout_at(deadline):
                    response = await self._whole(asked, stops, pieces)
            except TimeoutError:
                raise self._late() from None
        await _send(response, send)

    async def _whole(self, asked: Asked, stops: StopStrings, pieces: AsyncIterator[Piece]) -> Response:
        tokens: list[list[int]] = [[] for _ in asked.prompts]
        ended: dict[int, Piece] = {}
        async for piece in pieces:
            tokens[piece.index] += piece.tokens
            if piece.ending:
                ended[piece.index] = piece
        choices = []
        for index, found in enumerate(tokens):
            stream = TextStream(self.service.tokenizer, stops, asked.prompts[index])
            before = stream.prompt if asked.echo else ""
            choices.append(answer.choice(index, before + stream.feed(found) + stream.finish(), ended[index].ending))
        return JSONResponse(answer.Completion(self.service.served.name).body(choices, _usage(list(ended.values()))))

    async def _events(
        self, asked: Asked, stops: StopStrings, pieces: AsyncIterator[Piece], deadline: float, send: Send, scope: Scope
    ) -> None:
        """The answer's status is known with the first piece."""
        started = False
        try:
            async with asyncio.timeout_at(deadline):
                async for content in self._contents(asked, stops, pieces):
                    if not started:
                        started = True
                        await send(_event_stream())
                    await send({"type": "http.response.body", "body": answer.event(content), "more_body": True})
                await send({"type": "http.response.body", "body": answer.DONE, "more_body": False})
        except (TimeoutError, RequestError) as error:
            refusal = error if isinstance(error, RequestError) else self._late()
            if not started:
                raise refusal from None
            try:
                async with asyncio.timeout(SENDING_SECONDS):
                    await send({"type": "http.response.body", "body": answer.event(refusal.as_dict()), "more_body": False})
            except TimeoutError:
                # Nobody reads: the answer cannot be ended, so the connection is.
                scope["state"]["abort"]()

    async def _contents(
        self, asked: Asked, stops: StopStrings, pieces: AsyncIterator[Piece]
    ) -> AsyncIterator[dict[str, Any]]:
        """The events' contents: pieces of text, whole characters each, and the usage where it is asked for."""
        completion = answer.Completion(self.service.served.name)
        streams = [TextStream(self.service.tokenizer, stops, prompt) for prompt in asked.prompts]
        before = [stream.prompt if asked.echo else "" for stream in streams]
        ended = []
        async for piece in pieces:
            index = piece.index
            text, before[index] = before[index] + streams[index].feed(piece.tokens), ""
            if piece.ending:
                text += streams[index].finish()
                ended.append(piece)
            if text or piece.ending:
                yield completion.body([answer.choice(index, text, piece.ending)])
        if asked.usage_event:
            yield completion.body([], _usage(ended))

    async def _pieces(self, asked: Asked, stops: StopStrings) -> AsyncGenerator[Piece, None]:
        """What the worker hears of the texts, until all have ended. Raises RequestError where they cannot be written."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        texts = [
            Text(
                index=index,
                prompt=prompt,
                limit=limit,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                stops=stops,
                seed=asked.seed,
                heard=lambda piece: loop.call_soon_threadsafe(queue.put_nowait, piece),
            )
            for index, (prompt, limit) in enumerate(zip(asked.prompts, asked.limits, strict=True))
        ]
        self._submit(texts)
        try:
            left = len(texts)
            while left:
                piece = await queue.get()
                if piece.ending == CLOSED:
                    raise _closing()
                if piece.ending == FAILED:
                    raise RequestError(500, "the model failed on this text; the server's output says why", code="internal_error")
                left -= bool(piece.ending)
                yield piece
        finally:
            self.service.worker.drop(texts)

    def _submit(self, texts: Sequence[Text]) -> None:
        try:
            self.service.worker.submit(texts)
        except FullError:
            room = self.service.worker.room
            message = f"{len(texts)} more would be more than the {counted(room, 'text')} that may wait here; try again later"
            raise RequestError(429, message, code="queue_full") from None
        except ClosedError:
            raise _closing() from None

    def _late(self) -> RequestError:
        limit = counted(self.service.seconds, "second")
        message = f"the request took longer than the {limit} that it may take; ask for fewer tokens"
        return RequestError(504, message, code="timeout")

    def _encode(self, text: str) -> list[int]:
        try:
            return self.service.encoder.encode(text, "prompt") if text else []
        except UserError as error:
            raise RequestError(400, str(error), "prompt") from None


async def _attended(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do it, but only as long as the client is there."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(response: Response, send: Send) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": False})


def _event_stream() -> dict[str, Any]:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _usage(ended: Sequence[Piece]) -> dict[str, Any]:
    return answer.usage([piece.statistics or Statistics() for piece in ended])


def _closing() -> RequestError:
    return RequestError(503, "the server is going down; ask another one, or later", code="closing")


async def _refused(_: Request, error: RequestError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.as_dict(), error.status, headers)


async def _unknown(request: Request, error: HTTPException) -> Response:
    """No such path, or not with this method."""
    place = f"{request.method} {json.dumps(request.url.path)[1:-1][:60]}"
    message = {
        404: f"{place} is not served; there are POST /v1/completions, GET /v1/models and GET /health",
        405: f"{place} is not allowed; allowed is {(error.headers or {}).get('Allow', 'another method')}",
    }.get(error.status_code, f"{place}: {error.detail}")
    return JSONResponse(RequestError(error.status_code, message).as_dict(), error.status_code, error.headers)


async def _broken(_: Request, __: Exception) -> Response:
    """Starlette raises it again, so that the server's output has the traceback."""
    error = RequestError(500, "the server failed on this request; its output says why", code="internal_error")
    return JSONResponse(error.as_dict(), 500)
