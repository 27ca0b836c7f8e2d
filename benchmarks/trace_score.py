"""Trace one score on a real socket: `python -m benchmarks.trace_score [--write]`.

Prints the calls on the way in, from the socket to the forward pass, and back, from the forward pass to the socket, and
the modules, classes and threads that they touch. With `--write`, the table in docs/architecture.md gets the
figures. A call counts if it enters a function of another module of the service than its caller's: that is when a reader
opens another file. All calls between functions of the service are also listed.
"""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from app.http.server import ServerProtocol
from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parent.parent
APP = ROOT / "app"
DOC = ROOT / "docs" / "architecture.md"
FORWARD = "app.inference.buffers:Buffers.__call__"
"""The call that begins the forward pass."""
SENT = "app.http.connection:CoalescingTransport.write"
"""The call that writes the response to the socket."""


@dataclass
class Call:
    """A call of a function of the service."""

    caller: str
    callee: str
    owner: str
    thread: str


@dataclass
class Trace:
    """The calls of one request, in order."""

    calls: list[Call] = field(default_factory=list)
    on: bool = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Record a call. The signature is that of `sys.setprofile`."""
        if not self.on or event != "call" or frame.f_code.co_name.startswith("<"):
            return
        module = _module(frame)
        if module is None:
            return
        owner = frame.f_code.co_qualname.rpartition(".")[0].partition(".<locals>")[0]
        caller = frame.f_back
        while caller is not None and _module(caller) is None:
            caller = caller.f_back
        source = "" if caller is None else _module(caller) or ""
        self.calls.append(Call(source, f"{module}:{frame.f_code.co_qualname}", owner, threading.current_thread().name))


def _module(frame: FrameType) -> str | None:
    name = str(frame.f_globals.get("__name__"))
    return name if name.startswith("app.") else None


async def trace(png: bytes, content_type: str) -> Trace:
    """Return the calls of one `POST /score`, after a few that warm everything up."""
    found = Trace()
    threading.setprofile(found)  # threads start with the first score
    settings = Settings(model_store=ROOT / "model_store", device="cpu", store_url="sqlite:///var/trace.db")
    app = create_app(settings)
    config = uvicorn.Config(app, lifespan="off", log_config=None, proxy_headers=False)
    config.load()
    state, stop, started = ServerState(), asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not started.is_set():
            return {"type": "lifespan.startup"}
        await stop.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Any) -> None:
        assert "failed" not in message["type"], message
        started.set()

    lifespan = asyncio.create_task(app({"type": "lifespan", "state": {}}, receive, send))
    await started.wait()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ServerProtocol(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    head = f"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\ncontent-length: {len(png)}\r\n\r\n"
    for number in range(5):
        await asyncio.sleep(0.2)  # nothing of an earlier request or of a timer is traced
        if number == 4:
            sys.setprofile(found)
            found.on = True
        writer.write(head.encode() + png)
        reply = await reader.readuntil(b"\r\n\r\n")
        found.on = False
        sys.setprofile(None)
        assert reply.startswith(b"HTTP/1.1 200 "), reply
        await reader.readexactly(int(re.findall(rb"content-length: (\d+)", reply)[0]))
    writer.close()
    server.close()
    stop.set()
    await lifespan
    threading.setprofile(None)
    return found


def figures(found: Trace) -> dict[str, int]:
    """Return the figures of a trace."""
    names = [call.callee for call in found.calls]
    forward, sent = names.index(FORWARD), names.index(SENT)
    inward, back = found.calls[: forward + 1], found.calls[forward + 1 : sent + 1]

    def crossing(calls: list[Call]) -> int:
        return sum(call.caller != call.callee.partition(":")[0] for call in calls)

    used = found.calls[: sent + 1]
    classes = {(call.callee.partition(":")[0], call.owner) for call in used if call.owner}
    return {
        "calls in": crossing(inward),
        "calls back": crossing(back),
        "modules": len({call.callee.partition(":")[0] for call in used}),
        "classes": len(classes),
        "threads": len({call.thread for call in used}),
        "all calls in": len(inward),
        "all calls back": len(back),
    }


def write(table: str) -> None:
    """Replace the table in docs/architecture.md."""
    text = DOC.read_text()
    begin, end = "<!-- trace -->", "<!-- /trace -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    DOC.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}")


def main() -> None:
    """Trace, print, and write if wanted."""
    png = (ROOT / "examples" / "zero.png").read_bytes()
    found = asyncio.run(trace(png, "image/png"))
    for call in found.calls:
        crossing = call.caller != call.callee.partition(":")[0]
        print(f"{'>' if crossing else ' '} {call.thread:12} {call.callee}")
    rows = [f"| {name} | {count} |" for name, count in figures(found).items()]
    table = "\n".join(["| figure | number |", "| --- | --- |", *rows])
    print(table)
    if "--write" in sys.argv:
        write(table)


if __name__ == "__main__":
    main()
