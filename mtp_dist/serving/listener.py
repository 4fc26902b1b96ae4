"""Accepts connections, as many at once as are allowed. One too many is told so; with no descriptor left it waits and says so
once, where asyncio's own loop would print a traceback for each try."""

import asyncio
import errno
import socket
import sys
from collections.abc import Callable

from mtp_dist.serving.connection import Connection, Refused, Times

BACKLOG = 128
RETRY_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""Between two lines about the same trouble."""
SEND_BYTES = 1 << 15
MOST_REFUSED = 32
"""Connections too many that are answered at one time; beyond, they are closed without a word."""


class Listener:
    """As asyncio's Server, as far as uvicorn needs it. ``connect`` makes a connection's protocol; its argument is called at the
    end."""

    def __init__(
        self, listening: socket.socket, most: int, times: Times, connect: Callable[[Callable[[], None]], Connection]
    ) -> None:
        self.listening, self.most, self.times, self.connect = listening, most, times, connect
        self.loop = asyncio.get_running_loop()
        self.open = self.refused = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.retry: asyncio.TimerHandle | None = None
        self.said = float("-inf")
        listening.setblocking(False)
        listening.listen(BACKLOG)
        self._start()

    def close(self) -> None:
        """Accept nothing more."""
        self.loop.remove_reader(self.listening.fileno())
        if self.retry is not None:
            self.retry.cancel()

    async def wait_closed(self) -> None:
        """Connections are waited for elsewhere."""

    def _start(self) -> None:
        self.loop.add_reader(self.listening.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                accepted, _ = self.listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._wait(error)
                return
            accepted.setblocking(False)
            # Else the kernel keeps megabytes for a client that reads nothing.
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            if self.open >= self.most and self.refused >= MOST_REFUSED:
                accepted.close()
                continue
            task = self.loop.create_task(self._begin(accepted, refuse=self.open >= self.most))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            if self.open >= self.most:
                self.refused += 1
            else:
                self.open += 1

    async def _begin(self, accepted: socket.socket, refuse: bool) -> None:
        gone = self._refused_gone if refuse else self._gone
        try:
            protocol = Refused(self.most, self.times, gone) if refuse else self.connect(gone)
            await self.loop.connect_accepted_socket(lambda: protocol, accepted)
        except OSError:
            # The client has gone already.
            accepted.close()
            gone()

    def _gone(self) -> None:
        self.open -= 1

    def _refused_gone(self) -> None:
        self.refused -= 1

    def _wait(self, error: OSError) -> None:
        """The socket stays readable: look away for a while."""
        self.loop.remove_reader(self.listening.fileno())
        self.retry = self.loop.call_later(RETRY_SECONDS, self._start)
        if self.loop.time() - self.said > SILENT_SECONDS:
            self.said = self.loop.time()
            way_out = "; allow more (ulimit -n), or fewer connections=" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
            line = f"warning: no connection can be accepted for the moment: {error.strerror}{way_out}"
            print(line, file=sys.stderr, flush=True)
