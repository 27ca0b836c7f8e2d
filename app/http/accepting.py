"""An event loop that accepts several connections per iteration.

uvloop accepts one connection per event-loop iteration. Under load an iteration takes a tenth of a second and more, so a
burst of new connections would delay a health check by seconds.

Only a process that listens alone uses this event loop. Of several workers that share a socket, the quickest would take
all connections, while uvloop's own listener spreads them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)

_ACCEPTED_TOGETHER = 64
"""Maximum number of connections that are accepted per event-loop iteration."""
_PAUSE_SECONDS = 1.0
"""Time without accepting after the process has run out of file descriptors."""


class Acceptor:
    """Accepts the connections of a socket. It has the methods of `asyncio.Server` that uvicorn calls.

    Args:
        loop: runs the protocols.
        factory: makes the protocol of a connection.
        listener: bound; it listens from here on.
        backlog: maximum number of connections that wait to be accepted.

    Raises:
        OSError: another process listens on the address.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: Callable[[], asyncio.BaseProtocol],
        listener: socket.socket,
        *,
        backlog: int,
    ) -> None:
        self._loop = loop
        self._factory = factory
        self._listener: socket.socket | None = listener
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self.sockets = (listener,)
        listener.setblocking(False)
        listener.listen(backlog)
        loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Stop accepting."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(listener)
            listener.close()
        if self._pause is not None:
            self._pause.cancel()

    async def wait_closed(self) -> None:
        """Return when the connections that were accepted have their protocols."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        if self._listener is None:
            return
        for _ in range(_ACCEPTED_TOGETHER):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # The connection stays in the backlog, so the socket would be reported as readable at once.
                _log.error("cannot accept connections: %s", error.strerror)
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(_PAUSE_SECONDS, self._resume)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _resume(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection)
        except OSError:
            connection.close()  # the client has disconnected already


def make_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop whose `create_server` accepts by `Acceptor`; asyncio's own loop if uvloop is missing."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()

    class Loop(uvloop.Loop):
        async def create_server(self, protocol_factory: Any, *given: Any, **named: Any) -> Any:
            listener = named.get("sock")
            if listener is None or named.get("ssl") is not None:
                return await super().create_server(protocol_factory, *given, **named)
            return Acceptor(self, protocol_factory, listener, backlog=named.get("backlog", 100))

    return Loop()
