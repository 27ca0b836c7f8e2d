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

import httpx
import numpy as np

from tests import model_stores, pngs
from tests.conftest import Server

PNG = {"content-type": "image/png"}
ABORTED = 100
"""Requests of one fault "abort requests"."""
REJECTED = 3
"""The version whose module differs from its checksum."""


class Faults:
    """Each fault is a coroutine that returns when the fault has happened.

    Args:
        server: a running service.
        folder: of its stores.
        png: an image that the service accepts.
        chance: of the soak.
    """

    def __init__(self, server: Server, folder: Path, png: bytes, chance: random.Random) -> None:
        self._server, self._png, self._random = server, png, chance
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
        await client.post("/score?fit=mnist", content=large, headers=PNG)

    async def _abort(self, count: int, request: bytes = b"", seconds: float = 0) -> None:
        head = b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
        request = request or head % len(self._png) + self._png[: self._random.randrange(len(self._png))]
        for _ in range(count):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
                writer.write(request)
                await writer.drain()
                await asyncio.sleep(seconds)
                writer.close()
                await writer.wait_closed()
