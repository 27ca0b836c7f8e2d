"""Which requests the gateway repeats when a replica does not answer them."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.process import gateway, make_secrets

ATTEMPTS = Counter[str]()


class _Mute(http.server.BaseHTTPRequestHandler):
    """A replica that is ready, and closes each connection with a `POST` request without a reply."""

    def do_GET(self) -> None:
        if self.path != "/readyz":
            ATTEMPTS[self.path] += 1
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        ATTEMPTS[self.path] += 1
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def mute_replica() -> Iterator[int]:
    """Yield the port of such a replica."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Mute) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "encoding", "size", "attempts"),
    [
        ("/score", None, 500, 3),
        ("/v2/models/zero/infer", None, 500, 3),
        ("/v2/models/zero/infer", None, 70_000, 1),
        ("/v2/models/zero/infer", "gzip", 500, 1),
        ("/v1/models/zero:predict", "gzip", 500, 1),
        ("/score/batch", None, 500, 1),
    ],
)
def test_only_small_requests_are_repeated(
    tmp_path: Path, path: str, encoding: str | None, size: int, attempts: int
) -> None:
    """A request of one image is sent again; one that may be large, or grow by decompression, is not."""
    ATTEMPTS.clear()
    key = make_secrets(tmp_path)
    with mute_replica() as port, gateway(tmp_path, port, key) as started, started.client(timeout=30) as client:
        body = bytes(size)
        headers = {"content-encoding": encoding} if encoding else {}
        reply = client.post(path, content=gzip.compress(body) if encoding else body, headers=headers)
    assert reply.status_code in (502, 503), reply.text
    assert dict(ATTEMPTS) == {path: attempts}


UNFINISHED = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n",
    b"GET /models HTTP/1.1\r\nHost: localhost\r\nX-API-Key: KEY\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET /score/batch HTTP/1.1\r\nHost: localhost\r\nX-API-Key: KEY\r\nContent-Length: 1\r\n\r\n",
    b"POST /score HTTP/1.1\r\nHost: localhost\r\nX-API-Key: KEY\r\nContent-Length: 9\r\n\r\n",
    b"POST /v2/models/zero/infer HTTP/1.1\r\nHost: localhost\r\nX-API-Key: KEY\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /v1/models/zero:predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: KEY\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: 9\r\n\r\n",
)


def test_unfinished_bodies_reach_no_replica(tmp_path: Path) -> None:
    """A request whose body does not arrive waits at the gateway, which answers 408; it holds no place of a replica."""
    ATTEMPTS.clear()
    key = make_secrets(tmp_path)
    with mute_replica() as port, gateway(tmp_path, port, key) as started, contextlib.ExitStack() as connections:
        opened = [connections.enter_context(started.connect(timeout=30)) for _ in UNFINISHED]
        for connection, request in zip(opened, UNFINISHED, strict=True):
            connection.sendall(request.replace(b"KEY", key.encode()))
        assert [connection.recv(4096).split(b" ", 2)[1] for connection in opened] == [b"408"] * len(UNFINISHED)
        assert not ATTEMPTS
