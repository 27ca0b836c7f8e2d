"""Measures what traces cost a request, and writes the figures into docs/configuration.md.

`python -m benchmarks.tracing` runs two services at the same time, so that other programs of the machine delay both:
one without traces, and one that sends every span to a receiver of OTLP in this process. Costs are processor time per
request.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.__main__ import IMAGES, digits, wrk
from benchmarks.processes import ROOT, Server, service
from tests.otlp import Receiver, receiving
from tests.waiting import wait_until

RESULTS = Path(__file__).parent / "results" / "tracing.json"
PAGE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- cost of traces -->\n", "<!-- /cost of traces -->"
CONNECTIONS = 16
SECONDS = 4
ROUNDS = 15
Cell = dict[str, float]


def loop_seconds(server: Server) -> float:
    """Return the processor time of the main thread so far, in which the event loop runs."""
    path = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/schedstat")
    return int(path.read_text().split()[0]) / 1e9


def load(server: Server, bodies: Path, settle: Callable[[float], object]) -> Cell:
    """Run one closed loop, and return its rate and the microseconds per request of the event loop and of all threads.

    Args:
        server: of the service.
        bodies: folder of images.
        settle: returns when the work of so many requests has been done.
    """
    loop, total = loop_seconds(server), server.cpu_seconds()
    found = wrk(server, bodies, form="raw", path="/score", connections=CONNECTIONS, seconds=SECONDS)
    requests = found["rate"] * SECONDS
    settle(requests)
    return {
        "rate": found["rate"],
        "loop_us": 1e6 * (loop_seconds(server) - loop) / requests,
        "total_us": 1e6 * (server.cpu_seconds() - total) / requests,
    }


def received(receiver: Receiver, requests: float) -> None:
    """Wait until all spans of a load have arrived, and forget them.

    Raises:
        AssertionError: spans were dropped.
    """

    def arrived() -> bool:
        return sum(span.name == "POST /score" for span in receiver.spans) >= 0.99 * requests

    wait_until(arrived, 20)
    receiver.requests.clear()


def measure(folder: Path, bodies: Path) -> dict[str, Any]:
    """Measure both services."""
    cells: dict[str, list[Cell]] = {"off": [], "on": []}
    with receiving() as receiver, ThreadPoolExecutor(1) as pool:
        off = service(folder, "off")
        on = service(folder, "on", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_BSP_SCHEDULE_DELAY="1000")
        try:
            for number in range(ROUNDS + 1):
                traced = pool.submit(load, on, bodies, lambda requests: received(receiver, requests))
                one, other = load(off, bodies, lambda _: None), traced.result()
                if number:  # the first round warms up
                    cells["off"].append(one)
                    cells["on"].append(other)
                    print(number, one, other, flush=True)
        finally:
            off.stop()
            on.stop()
    differences = {
        name: [one[name] - other[name] for one, other in zip(cells["on"], cells["off"], strict=True)]
        for name in ("loop_us", "total_us")
    }
    return {"connections": CONNECTIONS, "rounds": cells, "cost": differences}


def paragraph(found: dict[str, Any]) -> str:
    """Return the paragraph of the page."""
    loop, total = (statistics.median(found["cost"][name]) for name in ("loop_us", "total_us"))
    low, high = min(found["cost"]["total_us"]), max(found["cost"]["total_us"])
    return (
        f"A traced request costs {total:.0f} µs of processor time ({low:.0f} to {high:.0f}; median and range of "
        f"{len(found['cost']['total_us'])} rounds with\n{found['connections']} connections), of which {loop:.0f} µs "
        "on the event loop.\n"
    )


def main() -> None:
    """Measure, and write the results and the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bodies = folder / "bodies"
        bodies.mkdir()
        for number, image in enumerate(digits(IMAGES)):
            Image.fromarray(image).save(bodies / f"{number}.png")
        found = measure(folder, bodies)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + paragraph(found) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
