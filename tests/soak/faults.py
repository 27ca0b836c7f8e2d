"""The faults of a soak: of the reconstruction store, of the model store, of the process, and of clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np

from tests import model_stores, pngs
from tests.conftest import Server

PNG = {"content-type": "image/png"}
ABORTED = 100
"""Requests of one fault "abort requests"."""
CONNECTIONS = 200
"""Connections of one fault "many connections"."""
REJECTED = 3
"""The version whose module differs from its checksum."""
RAISES = 5
"""The version whose forward pass raises for a white image."""


class Observer(Protocol):
    """What the faults report to the soak."""

    def check(self, holds: bool, message: str) -> None:
        """Report a condition that must hold."""

    def note_score(self, document: dict[str, Any], place: int | None) -> None:
        """Compare and count the score of the image at `place`; None stands for another image."""

    def note_reply(self, route: str, status: int) -> None:
        """Count a reply that another client than the one of the soak has read."""


class Faults:
    """Each fault is a coroutine that returns when the fault has happened.

    Args:
        server: a running service.
        folder: of its stores.
        pixels: the image at place 0, uint8 [28, 28]; its first pixel is not white.
        chance: of the soak.
        observer: gets what the faults find.
    """

    def __init__(
        self, server: Server, folder: Path, pixels: np.ndarray, chance: random.Random, observer: Observer
    ) -> None:
        self._server, self._random, self._observer = server, chance, observer
        white = pixels.copy()
        white[0, 0] = 255
        self._png, self._white = pngs.plain(pixels), pngs.plain(white)
        self._file = folder / "reconstructions.db"
        self._store = folder / "store"
        self._versions = self._store / "zero-article"
        self.all: dict[str, Callable[[httpx.AsyncClient], Awaitable[None]]] = {
            "delete the store": self._delete,
            "damage the store": self._damage,
            "replace the store": self._replace,
            "promote": self._promote,
            "promote a damaged version": self._promote_damaged,
            "break CURRENT": self._break_current,
            "looping link": self._looping_link,
            "pause the process": self._pause,
            "abort requests": self._abort_requests,
            "slow batch": self._slow_batch,
            "unknown versions": self._unknown_versions,
            "large fit": self._large_fit,
            "many connections": self._many_connections,
            "vanishing version": self._vanishing_version,
            "raising version": self._raising_version,
        }

    async def _delete(self, _: httpx.AsyncClient) -> None:
        for ending in ("", "-journal"):
            self._file.with_name(self._file.name + ending).unlink(missing_ok=True)

    async def _damage(self, _: httpx.AsyncClient) -> None:
        if self._file.exists():
            with self._file.open("r+b") as content:
                content.write(os.urandom(20_000))

    async def _replace(self, _: httpx.AsyncClient) -> None:
        copy = self._file.with_suffix(".copy")
        with contextlib.suppress(FileNotFoundError):  # the service has not created it again
            shutil.copy(self._file, copy)
            copy.replace(self._file)

    async def _promote(self, _: httpx.AsyncClient) -> None:
        model_stores.promote(self._store, self._random.choice((1, 2)))

    async def _promote_damaged(self, _: httpx.AsyncClient) -> None:
        folder = self._versions / str(REJECTED)
        if not folder.exists():
            shutil.copytree(self._versions / "1", folder)
            model_stores.change(folder, version=REJECTED)
        module = bytearray((self._versions / "1" / "model.pt").read_bytes())
        module[self._random.randrange(len(module))] ^= 1 << self._random.randrange(8)
        (folder / "model.pt").write_bytes(module)
        model_stores.promote(self._store, REJECTED)

    async def _break_current(self, _: httpx.AsyncClient) -> None:
        content = self._random.choice((b"", b"x" * 1000, b"99", b"\xff\xfe"))
        self._versions.joinpath("CURRENT").write_bytes(content)

    async def _looping_link(self, _: httpx.AsyncClient) -> None:
        link = self._versions / "4"
        if link.is_symlink():
            link.unlink()
        else:
            link.symlink_to(link)

    async def _pause(self, _: httpx.AsyncClient) -> None:
        assert self._server.process is not None
        self._server.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self._random.uniform(0.1, 1.0))
        finally:
            self._server.process.send_signal(signal.SIGCONT)

    async def _abort_requests(self, _: httpx.AsyncClient) -> None:
        await self._abort(ABORTED)

    async def _slow_batch(self, _: httpx.AsyncClient) -> None:
        head = b"POST /score/batch HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n\r\n"
        await self._abort(1, head, seconds=self._random.uniform(0.5, 2.0))

    async def _unknown_versions(self, client: httpx.AsyncClient) -> None:
        for number in (1, 2, REJECTED, 4, 99):
            await client.post(f"/score?model=zero-article@{number}", content=b"no image", headers=PNG)

    async def _large_fit(self, client: httpx.AsyncClient) -> None:
        large = pngs.plain(np.tile(pngs.gradient(), (30, 30)))
        reply = await client.post("/score?fit=mnist", content=large, headers=PNG)
        if reply.status_code == 200:
            self._observer.note_score(reply.json(), None)

    async def _many_connections(self, _: httpx.AsyncClient) -> None:
        """Hold connections open, and use each of them afterwards."""
        opened = [await asyncio.open_connection("127.0.0.1", self._server.port) for _ in range(CONNECTIONS)]
        await asyncio.sleep(1)
        for _, writer in opened:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        for reader, writer in opened:
            async with asyncio.timeout(30):
                line = await reader.readline()
            self._observer.check(line.startswith(b"HTTP/1.1 200 "), f"a held connection gets {line!r}")
            writer.close()

    async def _vanishing_version(self, client: httpx.AsyncClient) -> None:
        """Move a version away for a moment. It keeps serving if it is loaded."""
        number = self._random.choice((1, 2))
        folder, away = self._versions / str(number), self._store.parent / "away"
        folder.rename(away)
        try:
            await asyncio.sleep(self._random.uniform(0.1, 1.0))
            await self._request_version(client, number, may_be=(200, 404, 503, 504))
        finally:
            away.rename(folder)

    async def _raising_version(self, client: httpx.AsyncClient) -> None:
        """Request a version by its number: for a white image its forward pass raises, for another one it does not."""
        reply = await client.post(f"/score?model=zero-article@{RAISES}", content=self._white, headers=PNG)
        self._observer.check(reply.status_code in (500, 503, 504), f"a raising version: {reply.text[:200]}")
        await self._request_version(client, RAISES, may_be=(200, 503, 504))

    async def _request_version(self, client: httpx.AsyncClient, number: int, may_be: tuple[int, ...]) -> None:
        reply = await client.post(f"/score?model=zero-article@{number}", content=self._png, headers=PNG)
        self._observer.check(reply.status_code in may_be, f"version {number}: {reply.status_code} {reply.text[:200]}")
        if reply.status_code == 200:
            document = reply.json()
            self._observer.check(document["version"] == number, f"version {document['version']} instead of {number}")
            self._observer.note_score(document, 0)

    async def _abort(self, count: int, request: bytes = b"", seconds: float = 0) -> None:
        """Send incomplete requests, and close each connection after `seconds`."""
        head = b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
        request = request or head % len(self._png) + self._png[: self._random.randrange(len(self._png))]
        for _ in range(count):
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
                writer.write(request)
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        line = await reader.readline()
                        self._observer.note_reply(request.split()[1].decode(), int(line.split()[1]))
                writer.close()
                await writer.wait_closed()
