"""The process's side of serving: a socket, uvicorn's event loop, and an end in good order."""

import asyncio
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from mtp_dist.errors import UserError
from mtp_dist.serving.connection import Connection, Times
from mtp_dist.serving.listener import Listener
from mtp_dist.serving.worker import Worker

CANCEL_SECONDS = 5.0
"""After the last texts were ended: for clients to take what they were sent."""
OTHER_DESCRIPTORS = 128
"""Descriptors besides connections: libraries, files, connections that are told that they are too many."""


def bound(host: str, port: int) -> socket.socket:
    """A socket with that address, not listening yet. Raises UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UserError(
            f"host={host} port={port} cannot be had: {error.strerror}; choose another address, or port=0 for a free one"
        ) from None
    return found


def address(listening: socket.socket) -> str:
    """As a client writes it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with connections of our own, telling when it listens; asked to stop it takes nothing more, and gives what runs
    ``patience`` seconds. ``most``: connections at once."""

    def __init__(
        self, app: ASGIApp, worker: Worker, patience: float, most: int, times: Times, ready: Callable[[], object]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                # Warnings are about what clients send, who may send them without end.
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(patience + CANCEL_SECONDS),
            )
        )
        self.worker, self.patience, self.most, self.times, self.ready = worker, patience, most, times, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """In place of uvicorn's: the same with ``Listener``."""

        def connect(gone: Callable[[], None]) -> Connection:
            shared = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
            return Connection(times=self.times, gone=gone, **shared)

        await self.lifespan.startup()
        self.servers = [Listener(listening, self.most, self.times, connect) for listening in sockets or []]  # type: ignore[misc]
        self.started = True
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.refuse()
        impatience = asyncio.create_task(self._end_what_runs())
        await super().shutdown(sockets)
        impatience.cancel()
        await asyncio.to_thread(self.worker.close)

    async def _end_what_runs(self) -> None:
        await asyncio.sleep(self.patience)
        await asyncio.to_thread(self.worker.close)
        await asyncio.sleep(CANCEL_SECONDS / 2)
        for connection in list(self.server_state.connections):
            cast(Connection, connection).abort()


def allow_descriptors(connections: int) -> None:
    """As many as so many connections and the rest need. Raises UserError where the system forbids it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"connections={connections} needs {needed} open files, and this process may have {hard}; give at most "
            f"connections={max(1, hard - OTHER_DESCRIPTORS)}, or allow more (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def serve(server: Server, listening: socket.socket) -> None:
    """Until SIGTERM (which ends the process with status 0) or SIGINT (KeyboardInterrupt)."""

    # uvicorn raises the signal once more when it has ended.
    def ended(*_: Any) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, ended)
    server.run([listening])
