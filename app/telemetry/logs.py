"""Structured logs on standard output: one line per request or event, as JSON or as text for a terminal.

Every line has `time`, `level`, `event` and `logger`, then the members of its event. No line contains an image, a key or
a path of the machine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import Any, ClassVar

from pydantic_core import to_json

from app.telemetry.writer import LineWriter

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

_TRUSTED = frozenset(("app", "uvicorn"))
"""Packages whose loggers may insert values into their messages."""

REQUEST = "request"
"""Event of the access log."""
_REQUEST_MEMBERS = {"level": "info", "event": REQUEST, "logger": "app.access"}
_REQUEST_JSON = to_json(_REQUEST_MEMBERS)[1:-1]


def iso_time(seconds: float) -> str:
    """Return a time in seconds since 1970 as ISO 8601 in UTC with milliseconds."""
    return f"{datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"


@lru_cache(maxsize=1)
def _to_the_second(second: int) -> bytes:
    return iso_time(second)[:19].encode()


class RecordFormatter(logging.Formatter):
    """Format a log record; the values passed as `extra` become members of the line.

    Args:
        render: makes the line.
    """

    def __init__(self, render: Callable[[dict[str, Any]], bytes]) -> None:
        super().__init__()
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line: dict[str, Any] = {
            "time": iso_time(record.created),
            "level": record.levelname.lower(),
            # Other libraries insert addresses, headers for the collector and texts of exceptions.
            "event": record.getMessage() if record.name.partition(".")[0] in _TRUSTED else str(record.msg),
            "logger": record.name,
        }
        line.update((key, value) for key, value in vars(record).items() if key not in _OWN)
        if record.exc_info and record.exc_info[0] is not None:
            # The message and the stack contain paths, and the message may contain what a client sent.
            line["error"] = record.exc_info[0].__name__
            line["at"] = _place(record.exc_info[2])
        return self._render(line).decode()


class JsonFormatter(RecordFormatter):
    """Format a log record as one JSON object."""

    def __init__(self) -> None:
        super().__init__(_json)


def _json(members: dict[str, Any]) -> bytes:
    return json.dumps(members, default=str).encode()


class TextRenderer:
    """Render the members of a line for a person who reads a terminal.

    Args:
        colors: whether to use colors.
    """

    _LEVELS: ClassVar = {"warning": "33", "error": "31", "critical": "31"}
    _STATUSES: ClassVar = {2: "32", 3: "36", 4: "33", 5: "31"}

    def __init__(self, *, colors: bool) -> None:
        self._colors = colors

    def __call__(self, members: dict[str, Any]) -> bytes:
        """Return the line: local time, level unless it is `info`, event or request, then `name=value`.

        Empty members and the times of the stages, `*_us`, are left out.
        """
        rest = dict(members)
        at, level, event, _ = (rest.pop(name, "") for name in ("time", "level", "event", "logger"))
        head = [self._paint("2", _local(str(at)))]
        if event == REQUEST and "status" in rest:
            method, route, status, seconds = (rest.pop(name, "") for name in ("method", "route", "status", "seconds"))
            took = [f"{1000 * float(seconds):.1f} ms"] if seconds != "" else []
            shown_status = self._paint(self._STATUSES.get(int(status) // 100, "31"), str(status))
            head += [shown_status, f"{method} {route}".strip(), *took]
        else:
            color = self._LEVELS.get(str(level), "")
            head += ([self._paint(color, str(level))] if color else []) + [self._paint("1", _plain(event))]
            if "url" in rest:
                head.append(self._paint("4", _plain(rest.pop("url"))))
        rest["request_id"] = rest.pop("request_id", None)  # of the least interest to a reader
        shown = {name: value for name, value in rest.items() if value not in (None, []) and not name.endswith("_us")}
        pairs = (f"{self._paint('2', f'{name}=')}{_plain(value)}" for name, value in shown.items())
        return " ".join([*head, *pairs]).encode(errors="backslashreplace")

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colors and code else text


def _local(time_of_line: str) -> str:
    try:
        return datetime.fromisoformat(time_of_line).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except ValueError:
        return time_of_line


def _plain(value: object) -> str:
    """Return a value in one line without control characters, which could change the terminal."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text.isprintable() else json.dumps(text)


def text_renderer(log_format: str, writer: LineWriter) -> TextRenderer | None:
    """Return what renders the lines as text, or None if they are JSON.

    Args:
        log_format: `json`, `text`, or `auto` for `text` on a terminal and `json` elsewhere.
        writer: writes the lines.
    """
    if log_format == "text" or (log_format == "auto" and writer.is_terminal):
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return TextRenderer(colors=writer.is_terminal and not plain)
    return None


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


def configure(level: str, log_format: str = "auto") -> LineWriter:
    """Send the records of all loggers of the process to standard output. A second call changes nothing.

    Args:
        level: least severe level that is logged.
        log_format: as in `text_renderer`.

    Returns:
        The writer of the lines.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LineHandler):
            return handler.writer
    handler = LineHandler(LineWriter())
    text = text_renderer(log_format, handler.writer)
    handler.setFormatter(JsonFormatter() if text is None else RecordFormatter(text))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about images of clients, with a path of the machine
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    if level == "info":  # the service logs its own start and stop
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return handler.writer


class AccessLog:
    """Log one line per request, with the members that all log lines have.

    Lines are collected for 50 ms and queued together. The logging module would cost more per request than scoring an
    image in a full micro-batch. A process that is killed loses the lines of the last 50 ms. A process that shuts down
    loses lines only if its output is not read.

    Args:
        writer: writes the lines.
        enabled: whether requests are logged.
        text: renders the lines as text. None: the lines are JSON.
    """

    def __init__(self, writer: LineWriter, *, enabled: bool = True, text: TextRenderer | None = None) -> None:
        self.writer = writer
        self._enabled = enabled
        self._text = text
        self._lines: list[bytes] = []
        self._millisecond, self._head = -1, b""

    def write(self, members: dict[str, Any]) -> None:
        """Log one request after its response; the members are JSON values."""
        if not self._enabled:
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.queue)
        now = time.time()
        if self._text is not None:
            self._lines.append(self._text({"time": iso_time(now), **_REQUEST_MEMBERS, **members}))
            return
        # The requests of a micro-batch are logged together, and formatting a time takes longer than the rest of a line.
        millisecond = int(1000 * now)
        if millisecond != self._millisecond:
            self._millisecond = millisecond
            second, rest = divmod(millisecond, 1000)
            self._head = b'{"time":"%b.%03dZ",%b,' % (_to_the_second(second), rest, _REQUEST_JSON)
        self._lines.append(self._head + to_json(members)[1:])

    def flush(self) -> bool:
        """Queue what was collected and wait, within a limit, until it is written. Return whether it was."""
        self.queue()
        return self.writer.flush()

    def queue(self) -> None:
        """Pass the collected lines to the writer."""
        lines, self._lines = self._lines, []
        if lines:
            self.writer.write(b"\n".join([*lines, b""]), len(lines))
