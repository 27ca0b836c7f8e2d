"""Send requests at a fixed rate, which does not depend on the server's replies.

Latency is measured from the time at which a request was scheduled, not from the time at which it was sent. So a stall
of the server also counts for the requests that were scheduled during the stall (coordinated omission).

Replies must have Content-Length. The module runs in a separate process and uses plain sockets, so that it takes little
CPU time from the server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import socket
import time
from collections import Counter, deque
from pathlib import Path

_PATIENCE_SECONDS = 10.0


class Connection:
    """One keep-alive connection with at most one request in flight."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.due = 0.0
        self._buffer = b""

    def ask(self, request: bytes, due: float) -> None:
        """Send a request, which is far smaller than what a socket buffers."""
        self.due = due
        self.socket.send(request)

    def reply(self) -> tuple[int, bool] | None:
        """Read what has come: the status and whether there is a Retry-After, or None while the reply is not whole.

        Raises:
            ConnectionError: the server closed the connection.
        """
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self._buffer[:end].lower()
        start = head.index(b"content-length: ") + 16
        stop = head.find(b"\r\n", start)
        if len(self._buffer) < end + 4 + int(head[start : stop if stop > 0 else None]):
            return None
        self._buffer = b""
        return int(head[9:12]), b"\nretry-after:" in head


def drive(port: int, requests: list[bytes], rate: float, seconds: float, count: int) -> dict[str, object]:
    """Send at one rate over `count` connections, wait up to ten seconds for the rest, and return what happened."""
    with contextlib.ExitStack() as stack:
        # Before the connections: `select` takes no descriptor above 1023.
        poller = stack.enter_context(select.epoll())
        opened = [Connection(port) for _ in range(count)]
        for connection in opened:
            stack.enter_context(connection.socket)
        return _drive(poller, opened, requests, rate, seconds)


def _drive(
    poller: select.epoll, opened: list[Connection], requests: list[bytes], rate: float, seconds: float
) -> dict[str, object]:
    connections = {connection.socket.fileno(): connection for connection in opened}
    for descriptor in connections:
        poller.register(descriptor, select.EPOLLIN)
    free, waiting = deque(opened), deque[tuple[bytes, float]]()
    replies: list[tuple[int, float, bool]] = []
    sent, lost, total = 0, 0, int(rate * seconds)
    began = time.perf_counter() + 0.01
    until = began + seconds + _PATIENCE_SECONDS
    while len(replies) + lost < total and (now := time.perf_counter()) < until:
        while sent < total and (due := began + sent / rate) <= now:
            waiting.append((requests[sent % len(requests)], due))
            sent += 1
        while waiting and free:
            try:
                free.popleft().ask(*waiting.popleft())
            except OSError:
                lost += 1
        # epoll waits in whole milliseconds, in which several requests become due; `select` waits for it to the point.
        until_next = began + sent / rate if sent < total else until
        select.select([poller], [], [], max(0.0, until_next - time.perf_counter()))
        for descriptor, _ in poller.poll(0):
            connection = connections[descriptor]
            try:
                found = connection.reply()
            except OSError:
                poller.unregister(descriptor)
                if connection in free:
                    free.remove(connection)
                else:
                    lost += 1
                continue
            if found is not None:
                replies.append((found[0], time.perf_counter() - connection.due, found[1]))
                free.append(connection)
    good = sorted(seconds for status, seconds, _ in replies if status == 200)
    statuses = Counter(status for status, _, _ in replies)
    return {
        "rate": rate,
        "seconds": seconds,
        "sent": total,
        "statuses": {str(status): statuses[status] for status in sorted(statuses)},
        "unanswered": total - len(replies),
        "lost_connections": lost,  # of requests under way, which are among the unanswered
        "refusals_without_retry_after": sum(1 for status, _, hinted in replies if status == 503 and not hinted),
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
    print(json.dumps(drive(chosen.port, posts, chosen.rate, chosen.seconds, chosen.connections)))
