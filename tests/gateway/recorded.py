"""Requests in the bytes of .NET's HttpClient and Go's net/http, and a client that sends bytes as they are."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.gateway.conftest import Both

_DOTNET = "e9a3c1f4-5f0b-4a3e-9d55-0c7c4c6ce6a1"
_DOTNET_KIND = f'multipart/form-data; boundary="{_DOTNET}"'
_DOTNET_FIELD = "Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name=alpha\r\n\r\n0.05"
_GO = "9b2f0d1e8c7a6b5f4e3d2c1b0a9f8e7d6c5b4a3f2e1d0c9b8a7f6e5d4c3b"


def exchange(both: Both, request: bytes, *, gateway: bool, timeout: float = 10) -> tuple[bytes, bytes]:
    """Send bytes on a new connection, and return head and body of the response; empty if there is none."""
    plain = socket.create_connection(("127.0.0.1", both.service.port), timeout) if not gateway else None
    with plain or both.gateway.connect(timeout) as connection:
        received = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(request)
            while not _complete(received) and (data := connection.recv(65536)):
                received += data
    head, _, body = _final(received).partition(b"\r\n\r\n")
    return head, body


def _final(received: bytes) -> bytes:
    """Return a response without the interim response before it."""
    return received.partition(b"\r\n\r\n")[2] if received.startswith(b"HTTP/1.1 100") else received


def _complete(received: bytes) -> bool:
    head, end, body = _final(received).partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return bool(end) and len(body) >= int(line.partition(b":")[2])
    return False


def _chunked(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@dataclass(frozen=True)
class _Form:
    """A multipart form, in the bytes of one client.

    Attributes:
        boundary: without quotes.
        kind: the value of Content-Type.
        field: headers and value of the parameter `alpha`.
        file: headers of a file; `{name}` stands for the name of its field.
    """

    boundary: str
    kind: str
    field: str
    file: str

    def body(self, png: bytes, *names: str) -> bytes:
        """Return a form with one part for each name; `alpha` is the parameter, and every other name is a file."""
        parts = [
            self.field.encode() if name == "alpha" else self.file.format(name=name).encode() + b"\r\n\r\n" + png
            for name in names
        ]
        start = f"--{self.boundary}\r\n".encode()
        return b"".join(start + part + b"\r\n" for part in parts) + f"--{self.boundary}--\r\n".encode()


def _requests(
    request: Callable[[str, str, bytes], bytes], form: _Form, png: bytes, *, field_first: bool = False
) -> list[bytes]:
    names = ("alpha", "file") if field_first else ("file", "alpha")
    return [
        request("/score", "image/png", png),
        request("/score", form.kind, form.body(png, *names)),
        request("/score/batch", form.kind, form.body(png, "files", "files")),
    ]


def _dotnet(png: bytes, key: str) -> list[bytes]:
    """`HttpClient`: quoted boundary, names without quotes, both forms of the file name, `traceparent`."""

    def request(path: str, kind: str, body: bytes) -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost:8000\r\nX-API-Key: {key}\r\n"
            "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    disposition = "Content-Disposition: form-data; name={name}; filename=zero.png; filename*=utf-8''zero.png"
    file = f"Content-Type: image/png\r\n{disposition}"
    return _requests(request, _Form(_DOTNET, _DOTNET_KIND, _DOTNET_FIELD, file), png, field_first=True)


def _dotnet_framework(png: bytes, key: str) -> list[bytes]:
    """`HttpClient` of .NET Framework: `Expect: 100-continue`, and chunks for a stream of unknown length."""

    def request(path: str, kind: str, body: bytes) -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nContent-Type: {kind}\r\nX-API-Key: {key}\r\nHost: localhost:8000\r\n"
            "Expect: 100-continue\r\nTransfer-Encoding: chunked\r\nConnection: Keep-Alive\r\n\r\n"
        )
        return head.encode() + _chunked(body, 512)

    file = "Content-Disposition: form-data; name={name}; filename=zero.png"
    return _requests(request, _Form(_DOTNET, _DOTNET_KIND, _DOTNET_FIELD, file), png)


def _go(png: bytes, key: str, *, piped: bool) -> list[bytes]:
    """`net/http` with `mime/multipart`: canonical header names, `application/octet-stream`, chunks from a pipe."""

    def request(path: str, kind: str, body: bytes) -> bytes:
        framing = "Transfer-Encoding: chunked" if piped else f"Content-Length: {len(body)}"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: Go-http-client/1.1\r\n{framing}\r\n"
            f"Content-Type: {kind}\r\nX-Api-Key: {key}\r\nAccept-Encoding: gzip\r\n\r\n"
        )
        return head.encode() + (_chunked(body, 4096) if piped else body)

    field = 'Content-Disposition: form-data; name="alpha"\r\n\r\n0.05'
    disposition = 'Content-Disposition: form-data; name="{name}"; filename="zero.png"'
    file = f"{disposition}\r\nContent-Type: application/octet-stream"
    return _requests(request, _Form(_GO, f"multipart/form-data; boundary={_GO}", field, file), png)


RECORDED: dict[str, Callable[[bytes, str], list[bytes]]] = {
    ".NET": _dotnet,
    ".NET Framework": _dotnet_framework,
    "Go": lambda png, key: _go(png, key, piped=False),
    "Go with a pipe": lambda png, key: _go(png, key, piped=True),
}
"""Each client's requests: the image as the body, a form with a parameter, and a batch form with two files."""
