"""Writes log lines from a separate thread, so that an unread standard output does not block callers."""

from __future__ import annotations

import os
import select
import threading
from collections import deque

_MAX_PENDING_BYTES = 1024 * 1024
_CLOSE_SECONDS = 1.0


class LineWriter:
    """Write log lines to a file descriptor from a separate thread, so that a blocked reader does not block callers.

    An unread pipe blocks `write` as soon as it is full. Lines wait in memory up to a limit; further lines
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

    @property
    def is_terminal(self) -> bool:
        """Whether the descriptor is a terminal."""
        try:
            return os.isatty(self._descriptor)
        except OSError:
            return False

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
