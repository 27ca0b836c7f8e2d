"""The clients against servers that misbehave, without the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from client import NO_RETRY, AsyncClient, Score, wire

GOOD = (
    b'{"id": null, "model": "zero", "version": 1, "mse": 0.1, "threshold": 0.2, "alpha": 0.01, "p_value": 0.5,'
    b' "is_anomaly": false, "reason": null}'
)


class Slow:
    """A server that answers no question before it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked = 0
        self.serving: set[asyncio.Task[None] | None] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes through one connection."""
        self.serving.add(asyncio.current_task())
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(3)
                self.asked += 1
                await self.go.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(GOOD), GOOD))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def slow() -> AsyncIterator[tuple[Slow, str]]:
    """Run such a server."""
    server = Slow()
    listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    async with listening:
        yield server, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        server.go.set()
        await asyncio.gather(*(task for task in server.serving if task is not None))


async def cancelled_after(turns: int, call: Callable[[], asyncio.Task[Score]]) -> None:
    """Make a call, and cancel it after so many turns of the event loop."""
    task = call()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_cancelled_call_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the cancellation comes, and however often, the next call finds a connection."""
    monkeypatch.setattr(wire, "CONNECTIONS", 4)
    async with slow() as (server, url), AsyncClient(url, retry=NO_RETRY) as service:
        server.go.set()
        for turns in range(6, 36):
            await asyncio.gather(
                *(cancelled_after(turns, lambda: asyncio.create_task(service.score(b"png"))) for _ in range(4))
            )
        assert isinstance(await asyncio.wait_for(service.score(b"png"), 20), Score)


async def test_who_was_cancelled_while_waiting_for_a_connection_is_not_sent() -> None:
    """Only what is under way goes on without its caller; closing the client ends that too."""
    async with slow() as (server, url), AsyncClient(url, retry=NO_RETRY) as service:
        calls = [asyncio.create_task(service.score(b"png")) for _ in range(100)]
        while server.asked < 64:
            await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ends} == {asyncio.CancelledError}
        await service.aclose()
        assert asyncio.all_tasks() - server.serving == {asyncio.current_task()}
    assert server.asked == 64
