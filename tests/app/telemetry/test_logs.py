"""The logs: every line is complete, in order, and never blocks the caller."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
import time

from app.telemetry.logs import AccessLog, JsonFormatter, LineHandler
from app.telemetry.writer import LineWriter


def read_all(descriptor: int, lines: list[bytes]) -> None:
    """Read lines from a pipe until its other end is closed, and close it."""
    with os.fdopen(descriptor, "rb") as pipe:
        lines.extend(pipe)


async def test_a_slow_reader_gets_every_line() -> None:
    """The rest of a write that a full pipe or a signal cuts short follows."""
    reads, writes = os.pipe()
    log = AccessLog(LineWriter(writes))
    for number in range(900):
        log.write({"number": number, "padding": "x" * 200})
    got: list[bytes] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        reader = threading.Timer(0.2, read_all, (reads, got))
        reader.start()
        log.queue()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        assert log.flush()
    finally:
        signal.signal(signal.SIGUSR1, before)
    os.close(writes)
    reader.join()
    assert [json.loads(line)["number"] for line in got] == list(range(900))


async def test_an_unread_pipe_blocks_nobody_and_drops_are_counted() -> None:
    """Lines beyond the limit are dropped; once the reader continues, the kept lines arrive complete and in order."""
    reads, writes = os.pipe()
    writer = LineWriter(writes, max_bytes=200_000)
    log = AccessLog(writer)
    began = time.monotonic()
    for number in range(4000):
        log.write({"number": number, "padding": "x" * 200})
        if number % 100 == 99:
            await asyncio.sleep(0)
            log.queue()
    assert not log.writer.flush(timeout=0.1)
    assert time.monotonic() - began < 5
    assert 0 < writer.dropped < 4000
    got: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(reads, got))
    reader.start()
    assert log.writer.flush(timeout=10)
    logging_handler = LineHandler(writer)
    logging_handler.setFormatter(JsonFormatter())
    logging_handler.handle(logging.LogRecord("app", logging.INFO, "", 0, "after", None, None))
    logging_handler.flush()
    os.close(writes)
    reader.join()
    lines = [json.loads(line) for line in got]
    numbers = [line["number"] for line in lines[:-1]]
    assert numbers == sorted(numbers)
    assert len(numbers) == 4000 - writer.dropped
    assert lines[-1]["event"] == "after"


async def test_a_closed_or_full_non_blocking_pipe_raises_no_error() -> None:
    """A reader that has closed its end only causes drops."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    writer = LineWriter(writes)
    log = AccessLog(writer)
    for number in range(2000):
        log.write({"number": number, "padding": "x" * 200})
    log.queue()
    assert not log.writer.flush(timeout=0.1)
    os.close(reads)
    assert log.writer.flush(timeout=10)
    assert writer.dropped > 0
    os.close(writes)


def test_other_libraries_insert_nothing_into_their_lines() -> None:
    """A line of a library contains the template of its message: a value may be a secret header or an address."""
    formatter = JsonFormatter()
    events = [
        json.loads(formatter.format(logging.LogRecord(name, logging.WARNING, "", 1, "%s failed", ("Bearer x",), None)))
        for name in ("app.main", "uvicorn.error", "opentelemetry.util.re", "urllib3")
    ]
    assert [each["event"] for each in events] == ["Bearer x failed"] * 2 + ["%s failed"] * 2
