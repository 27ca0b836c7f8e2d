"""Structured logs: one JSON object a line on standard output. Never an image, a key or a path of the machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
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


def configure(level: str) -> None:
    """Send every logger of the process to standard output as JSON."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


_HELD_SECONDS = 0.05
_MOST_HELD = 1000


class AccessLog:
    """One line a request, gathered for a moment and written at once.

    The logging module would cost more than the scoring of an image in a full micro-batch, and a system call for each
    line a third of it. A process that is killed loses the lines of that moment; one that is stopped loses none.
    """

    def __init__(self, *, enabled: bool, descriptor: int = 1) -> None:
        self._enabled = enabled
        self._descriptor = descriptor
        self._lines: list[bytes] = []

    def write(self, members: dict[str, Any]) -> None:
        """Log one answered request; the members are JSON values."""
        if not self._enabled:
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(_HELD_SECONDS, self.flush)
        self._lines.append(to_json(members))
        if len(self._lines) >= _MOST_HELD:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        lines, self._lines = self._lines, []
        left = memoryview(b"\n".join([*lines, b""]))
        with contextlib.suppress(OSError):  # nobody can read the log: requests go on
            while left:
                left = left[os.write(self._descriptor, left) :]
