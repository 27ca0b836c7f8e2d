"""Replies leave in one piece."""

from __future__ import annotations

import asyncio

from app.protocol import _Joined


class Wire:
    """A transport that remembers what was written, and when it was closed."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        """Remember."""
        assert not self.closed
        self.writes.append(data)

    def close(self) -> None:
        """Remember."""
        self.closed = True


async def test_what_is_written_in_one_turn_is_sent_at_once():
    """Head and body of a reply are one write, those of the next turn another."""
    wire = Wire()
    joined = _Joined(wire, asyncio.get_running_loop())
    joined.write(b"head ")
    joined.write(b"body")
    assert wire.writes == []
    await asyncio.sleep(0)
    joined.write(b"more")
    await asyncio.sleep(0)
    assert wire.writes == [b"head body", b"more"]


async def test_closing_sends_first():
    """Nothing that was written is lost to `close`."""
    wire = Wire()
    joined = _Joined(wire, asyncio.get_running_loop())
    joined.write(b"last words")
    joined.close()
    assert (wire.writes, wire.closed) == ([b"last words"], True)
    await asyncio.sleep(0)
    assert wire.writes == [b"last words"]


async def test_much_is_not_held_back():
    """A long reply does not wait in memory for the end of the turn."""
    wire = Wire()
    joined = _Joined(wire, asyncio.get_running_loop())
    for _ in range(5):
        joined.write(bytes(30_000))
    assert sum(map(len, wire.writes)) >= 90_000
    await asyncio.sleep(0)
    assert sum(map(len, wire.writes)) == 150_000
