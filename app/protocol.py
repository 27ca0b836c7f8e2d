"""The server's own refusal of what is no HTTP, said as every other refusal is.

Knows: uvicorn's protocol class. Does not know: requests; there is none here that could have an id.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.problems import MalformedRequest, render


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it; bytes that are none are answered with a problem."""

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a request that asks for another protocol is answered as if it had not (RFC 9110, 7.8)."""

    def send_400_response(self, msg: str) -> None:
        """Answer and close the connection."""
        problem = MalformedRequest(msg.rstrip(".").lower())
        body = render(problem)
        head = [b"HTTP/1.1 400 Bad Request", b"connection: close", b"content-length: %d" % len(body)]
        head += [f"{name}: {value}".encode() for name, value in problem.headers().items()]
        self.transport.write(b"\r\n".join([*head, b"", body]))
        self.transport.close()
