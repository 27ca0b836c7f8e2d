"""A service in this process with two ports, of which one never takes the fast path."""

from __future__ import annotations

import asyncio
import functools
import json
import tempfile
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from app.http.server import ServerProtocol
from app.main import create_app
from app.settings import Settings
from tests.conftest import MODEL_STORE, lifespan

_QUERIES = (
    "",
    "?alpha=0.05",
    "?model=zero-article",
    "?model=none",
    "?alpha=x",
    "?include=reconstruction",
    "?a=1",
    "?fit=strict",
)
_TYPES = (
    "image/png",
    "multipart/form-data; boundary=b",
    'multipart/form-data; boundary="b"',
    "application/octet-stream",
    "multipart/form-data",
    "image/jpeg",
    "application/x-www-form-urlencoded",
    "",
)


class General(ServerProtocol):
    """A connection whose requests all take the general path."""

    def _takes_fast_path(self, headers: dict[bytes, bytes]) -> bool:  # noqa: ARG002
        return False


class _Service:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        settings = Settings(
            model_store=MODEL_STORE,
            default_model="zero-article",
            device="cpu",
            store_url=f"sqlite:///{self.folder.name}/reconstructions.db",
            log_requests=False,
            log_level="error",
            microbatch_max_size=8,
        )
        self.app = create_app(settings)
        self.config = uvicorn.Config(self.app, lifespan="off", log_config=None, proxy_headers=False)
        self.config.load()
        self.running = lifespan(self.app)
        self.ports = self.loop.run_until_complete(self._start())

    async def _start(self) -> list[int]:
        await self.running.__aenter__()
        ports = []
        for kind in (ServerProtocol, General):
            make = functools.partial(kind, self.config, ServerState(), {})
            server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
            ports.append(server.sockets[0].getsockname()[1])
        return ports

    def ask(self, port: int, head: bytes, pieces: list[bytes]) -> tuple[bytes, Any]:
        """Send one request in packets, and return the status line and the part of the reply that never changes."""
        return self.loop.run_until_complete(asyncio.wait_for(self._ask(port, head, pieces), 20))

    async def _ask(self, port: int, head: bytes, pieces: list[bytes]) -> tuple[bytes, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for piece in (head, *pieces):
                writer.write(piece)
                await asyncio.sleep(0)
            reply = await reader.read()
        finally:
            writer.close()
        start, _, body = reply.partition(b"\r\n\r\n")
        status = start.split(b"\r\n")[0]
        if not status:
            return b"", b""
        document = json.loads(body)
        for changing in ("id", "instance", "reconstruction", "reconstruction_url"):
            document.pop(changing, None)
        return status, document


@functools.cache
def _service() -> _Service:
    return _Service()


def compare_paths(query: int, kind: int, body: bytes, pieces: list[bytes]) -> None:
    """Send one request three times, and compare the replies.

    Raises:
        AssertionError: the replies differ, or one of them is a 5xx.
    """
    service = _service()
    content_type = _TYPES[kind % len(_TYPES)]
    head = (
        f"POST /score{_QUERIES[query % len(_QUERIES)]} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n" + (f"content-type: {content_type}\r\n" if content_type else "") + "\r\n"
    ).encode()
    fast, general = service.ports
    whole = service.ask(fast, head + body, [])
    assert whole[0].split(b" ")[1][:1] in (b"2", b"4"), whole
    assert service.ask(fast, head, pieces) == whole, "the packets decide about the reply"
    assert service.ask(general, head + body, []) == whole, "fast and general path differ"
