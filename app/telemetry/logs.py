"""Structured logs: one JSON object a line on standard output. Never an image, a key or a path of the machine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import threading
from collections import deque
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from pydantic_core import to_json

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """Turns a log record into one JSON object; what was given as `extra` becomes members of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update((key, value) for key, value in vars(record).items() if key not in _OWN)
        if record.exc_info and record.exc_info[0] is not None:
            # Neither its words nor the stack: both hold paths, and words may hold what a client sent.
            line["error"] = record.exc_info[0].__name__
            line["at"] = _place(record.exc_info[2])
        return json.dumps(line, default=str)


def _place(traceback: TracebackType | None) -> str | None:
    """Return `module:line` of the last step of a stack inside the service, or else of its very last step."""
    own = last = None
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__"))
        last = f"{module}:{traceback.tb_lineno}"
        own = last if module.partition(".")[0] == "app" else own
        traceback = traceback.tb_next
    return own or last


_FLUSH_SECONDS = 0.05
_MAX_PENDING_BYTES = 1024 * 1024
_CLOSE_SECONDS = 1.0


class LineWriter:
    """Write log lines to a file descriptor from a thread of its own, so that a blocked reader blocks no caller.

    A pipe that nobody reads blocks `write` for ever once it is full. Lines wait in memory up to a limit; further lines
    are dropped and counted until the reader continues.

    Args:
        descriptor: file descriptor to write to.
        max_bytes: maximum number of bytes that wait for the descriptor.

    Attributes:
        dropped: number of lines dropped so far.
    """

    def __init__(self, descriptor: int = 1, *, max_bytes: int = _MAX_PENDING_BYTES) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._writing = False
        self._thread: threading.Thread | None = None

    def write(self, lines: bytes, count: int = 1) -> None:
        """Queue complete lines, or drop and count them if too many bytes wait. Any thread may call it."""
        with self._changed:
            if self._pending_bytes + len(lines) > self._max_bytes:
                self.dropped += count
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._pending.append(lines)
            self._pending_bytes += len(lines)
            self._changed.notify_all()

    def flush(self, timeout: float = _CLOSE_SECONDS) -> bool:
        """Wait until all queued lines are written. Return False if `timeout` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._pending or self._writing), timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._pending)
                lines = b"".join(self._pending)
                self._pending.clear()
                self._writing = True
            self._write(lines)
            with self._changed:
                self._pending_bytes -= len(lines)

    def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # the descriptor does not block: its pipe is full
                select.select([], [self._descriptor], [])
            except OSError:  # the reader has closed its end
                with self._changed:
                    self.dropped += bytes(rest).count(b"\n")
                return


class LineHandler(logging.Handler):
    """Pass formatted log records to a `LineWriter`."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one record."""
        try:
            self.writer.write(self.format(record).encode() + b"\n")
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait, within a limit, until all queued lines are written."""
        self.writer.flush()


def configure(level: str) -> LineWriter:
    """Send the records of every logger of the process to standard output as JSON. Return what writes them."""
    handler = LineHandler(LineWriter())
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return handler.writer


class AccessLog:
    """Log one line per request. Lines are collected for 50 ms and queued together.

    The logging module would cost more per request than scoring an image in a full micro-batch. A process that is killed
    loses the lines of the last 50 ms; a process that shuts down loses none, unless nobody reads its output.
    """

    def __init__(self, writer: LineWriter, *, enabled: bool = True) -> None:
        self.writer = writer
        self._enabled = enabled
        self._lines: list[bytes] = []

    def write(self, members: dict[str, Any]) -> None:
        """Log one answered request; the members are JSON values."""
        if not self._enabled:
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.queue)
        self._lines.append(to_json(members))

    def flush(self) -> bool:
        """Queue what was collected and wait, within a limit, until it is written. Return whether it was."""
        self.queue()
        return self.writer.flush()

    def queue(self) -> None:
        """Pass the collected lines to the writer."""
        lines, self._lines = self._lines, []
        if lines:
            self.writer.write(b"\n".join([*lines, b""]), len(lines))
