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
