"""The process's side of serving: a socket, uvicorn's event loop, and an end in good order."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from mtp_dist.errors import UserError
from mtp_dist.serving.worker import Worker

CANCEL_SECONDS = 5.0
"""After the last texts were ended: for clients to take what they were sent."""


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
    """uvicorn, telling when it listens; asked to stop it takes nothing more, and gives what runs ``patience`` seconds."""

    def __init__(self, app: Starlette, worker: Worker, patience: float, ready: Callable[[], object]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(patience + CANCEL_SECONDS),
            )
        )
        self.worker, self.patience, self.ready = worker, patience, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
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


def serve(server: Server, listening: socket.socket) -> None:
    """Until SIGTERM (which ends the process with status 0) or SIGINT (KeyboardInterrupt)."""

    # uvicorn raises the signal once more when it has ended.
    def ended(*_: Any) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, ended)
    server.run([listening])
