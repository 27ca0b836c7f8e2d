"""Measures what traces cost a request, and writes the figures into docs/configuration.md.

`python -m benchmarks.tracing` sends the same bursts of requests in turn to two services: one without traces, and one
that sends every span to a receiver of OTLP in this process. Both therefore have the same micro-batches, and other
programs of the machine disturb both alike. Costs are processor time per request.
"""

from __future__ import annotations

import io
import json
import re
import socket
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.__main__ import digits
from benchmarks.processes import ROOT, Server, service
from tests.otlp import Receiver, receiving
from tests.waiting import wait_until

RESULTS = Path(__file__).parent / "results" / "tracing.json"
PAGE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- cost of traces -->\n", "<!-- /cost of traces -->"
CONNECTIONS = 16
BURSTS = 200
ROUNDS = 20
Cost = dict[str, float]


class Load:
    """Connections to one service, which send a request each at the same time.

    Args:
        server: of the service.
        images: encoded, one per connection.
    """

    def __init__(self, server: Server, images: Sequence[bytes]) -> None:
        self._tasks = Path(f"/proc/{server.process.pid}/task")
        self._main = str(server.process.pid)
        self._sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in images]
        head = "POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: {}\r\n\r\n"
        self._requests = [head.format(len(image)).encode() + image for image in images]

    def burst(self) -> None:
        """Send all requests, and read all responses."""
        for connection, request in zip(self._sockets, self._requests, strict=True):
            connection.sendall(request)
        for connection in self._sockets:
            received = connection.recv(65_536)
            while b"\r\n\r\n" not in received or len(received) < _length(received):
                received += connection.recv(65_536)
            assert received.startswith(b"HTTP/1.1 200 ")

    def used(self) -> Cost:
        """Return the microseconds of processor time so far, of the event loop and of all threads."""
        times = {task.name: int((task / "schedstat").read_text().split()[0]) / 1e3 for task in self._tasks.iterdir()}
        return {"loop_us": times[self._main], "total_us": sum(times.values())}


def _length(response: bytes) -> int:
    head = response.partition(b"\r\n\r\n")[0]
    found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    assert found is not None
    return len(head) + 4 + int(found[1])


def received(receiver: Receiver, requests: int) -> None:
    """Wait until the spans of all requests have arrived, and forget them.

    Raises:
        AssertionError: spans were dropped.
    """
    wait_until(lambda: sum(span.name == "POST /score" for span in receiver.spans) == requests, 20)
    receiver.requests.clear()


def measure(folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
    """Measure both services in turn."""
    rounds: dict[str, list[Cost]] = {"off": [], "on": []}
    requests = BURSTS * len(images)
    with receiving() as receiver:
        off = service(folder, "off")
        on = service(folder, "on", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_BSP_SCHEDULE_DELAY="1000")
        try:
            loads = {"off": Load(off, images), "on": Load(on, images)}
            for number in range(ROUNDS + 1):
                before = {name: load.used() for name, load in loads.items()}
                for _ in range(BURSTS):
                    for load in loads.values():
                        load.burst()
                received(receiver, requests)
                if number == 0:
                    continue  # warms up
                for name, load in loads.items():
                    used = load.used()
                    rounds[name].append({each: (used[each] - before[name][each]) / requests for each in used})
                print(number, rounds["off"][-1], rounds["on"][-1], flush=True)
        finally:
            off.stop()
            on.stop()
    cost = {
        name: [one[name] - other[name] for one, other in zip(rounds["on"], rounds["off"], strict=True)]
        for name in ("loop_us", "total_us")
    }
    return {"connections": len(images), "requests": requests, "rounds": rounds, "cost": cost}


def paragraph(found: dict[str, Any]) -> str:
    """Return the paragraph of the page."""
    loop, total = (statistics.median(found["cost"][name]) for name in ("loop_us", "total_us"))
    low, *_, high = statistics.quantiles(found["cost"]["total_us"], n=4)
    return (
        f"A traced request costs {total:.0f} µs of processor time, of which {loop:.0f} µs on the event loop (median of "
        f"{len(found['cost']['total_us'])} rounds;\nthe quartiles are {low:.0f} and {high:.0f} µs). "
        f"Micro-batches had up to {found['connections']} images, and every request was sampled.\n"
    )


def main() -> None:
    """Measure, and write the results and the page."""
    images = []
    for image in digits(CONNECTIONS):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        images.append(file.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), images)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + paragraph(found) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
