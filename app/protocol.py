"""What the server itself does of HTTP: refusing what is none, and letting go of who takes nothing.

Knows: uvicorn's protocol class. Does not know: requests; there need not be one here.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.problems import MalformedRequest, render

STUCK_SECONDS = 60.0
"""How long a client may take nothing of a reply that is larger than what the connection buffers."""


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it; bytes that are none are answered with a problem."""

    _stuck: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Note that the client is behind: closing waits until all is taken, and so for ever, if nobody aborts."""
        super().pause_writing()
        self._stuck = self.loop.call_later(STUCK_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Note that the client has caught up."""
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def send_400_response(self, msg: str) -> None:
        """Answer and close the connection."""
        problem = MalformedRequest(msg.rstrip(".").lower())
        body = render(problem)
        head = [b"HTTP/1.1 400 Bad Request", b"connection: close", b"content-length: %d" % len(body)]
        head += [f"{name}: {value}".encode() for name, value in problem.headers().items()]
        self.transport.write(b"\r\n".join([*head, b"", body]))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a request that asks for another protocol is answered as if it had not (RFC 9110, 7.8)."""
