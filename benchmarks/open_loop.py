"""Requests at a fixed rate, whatever the server does.

Latency counts from when a request was due, not from when it could be sent, so a server that stalls is charged for every
request that should have been sent meanwhile.

Knows: sockets, HTTP replies with Content-Length. Run as a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from pathlib import Path

import uvloop


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._due = 0.0
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be free for a request."""
        self._transport = transport
        self._run.free(self)

    def ask(self, request: bytes, due: float) -> None:
        """Send a request."""
        self._due = due
        self._transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Note a reply once it is whole."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        start = head.index(b"content-length: ") + 16
        stop = head.find(b"\r\n", start)
        if len(self._buffer) < end + 4 + int(head[start : stop if stop > 0 else None]):
            return
        status, hinted = int(head[9:12]), b"\nretry-after:" in head
        self._buffer = b""
        self._run.answered(status, hinted, self._due)
        self._run.free(self)

    def connection_lost(self, _: Exception | None) -> None:
        """Count it: no server may drop a connection here."""
        self._run.lost += not self._run.over


class Run:
    """One run at one rate."""

    def __init__(self, requests: list[bytes], rate: float, seconds: float) -> None:
        self._requests, self._rate, self._total = requests, rate, int(rate * seconds)
        self._free: deque[Connection] = deque()
        self._due: deque[tuple[bytes, float]] = deque()
        self.replies: list[tuple[float, int, float, bool]] = []
        self.lost = 0
        self.over = False

    def free(self, connection: Connection) -> None:
        """Take a connection back, or give it the request that is due longest."""
        if self._due:
            connection.ask(*self._due.popleft())
        else:
            self._free.append(connection)

    def answered(self, status: int, hinted: bool, due: float) -> None:
        """Note when a request was due, its status, and how long it took."""
        self.replies.append((due, status, time.perf_counter() - due, hinted))

    async def go(self) -> None:
        """Send everything and wait up to ten seconds for the rest."""
        began = time.perf_counter() + 0.01
        sent = 0
        while sent < self._total:
            now = time.perf_counter()
            while sent < self._total and (due := began + sent / self._rate) <= now:
                request = self._requests[sent % len(self._requests)]
                if self._free:
                    self._free.popleft().ask(request, due)
                else:
                    self._due.append((request, due))
                sent += 1
            await asyncio.sleep(0.001)
        until = time.perf_counter() + 10
        while len(self.replies) < self._total and time.perf_counter() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def drive(port: int, requests: list[bytes], rate: float, seconds: float, connections: int) -> dict[str, object]:
    """Run at one rate and return what happened."""
    run = Run(requests, rate, seconds)
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(lambda: Connection(run), "127.0.0.1", port)
    await run.go()
    run.over = True
    good = sorted(seconds for _, status, seconds, _ in run.replies if status == 200)
    statuses = {str(status): 0 for status in sorted({reply[1] for reply in run.replies})}
    for _, status, _, _ in run.replies:
        statuses[str(status)] += 1
    return {
        "rate": rate,
        "seconds": seconds,
        "sent": run._total,
        "statuses": statuses,
        "unanswered": run._total - len(run.replies),
        "lost_connections": run.lost,
        "refusals_without_retry_after": sum(1 for _, status, _, hinted in run.replies if status == 503 and not hinted),
        "p50_ms": 1e3 * good[len(good) // 2] if good else None,
        "p99_ms": 1e3 * good[int(len(good) * 0.99)] if good else None,
        "max_ms": 1e3 * good[-1] if good else None,
    }


def _request(png: bytes, path: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\ncontent-length: {len(png)}\r\n\r\n"
    return head.encode() + png


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("bodies", type=Path)
    parser.add_argument("rate", type=float)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--path", default="/score")
    chosen = parser.parse_args()
    posts = [_request(file.read_bytes(), chosen.path) for file in sorted(chosen.bodies.glob("*.png"))]
    answer = drive(chosen.port, posts, chosen.rate, chosen.seconds, chosen.connections)
    print(json.dumps(uvloop.run(answer)))
