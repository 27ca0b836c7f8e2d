"""The access log: no line is lost, torn, or in a request's way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading

from app.logs import AccessLog


async def test_a_log_that_is_read_slowly_loses_nothing() -> None:
    """Whatever a signal or a full pipe leaves over of a write is written too."""
    reads, writes = os.pipe()
    log = AccessLog(enabled=True, descriptor=writes)
    for number in range(900):
        log.write({"number": number, "padding": "x" * 200})
    got: list[bytes] = []

    def read() -> None:
        with os.fdopen(reads, "rb") as lines:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)  # in the middle of the write
            got.extend(lines)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        reader = threading.Timer(0.2, read)
        reader.start()
        log.flush()
    finally:
        signal.signal(signal.SIGUSR1, before)
    os.close(writes)
    reader.join()
    assert [json.loads(line)["number"] for line in got] == list(range(900))


async def test_a_log_that_nobody_reads_is_no_error() -> None:
    """A reader that has left, or a pipe that does not wait, stops no request."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    log = AccessLog(enabled=True, descriptor=writes)
    for end in (lambda: None, lambda: os.close(reads)):
        end()
        for number in range(2000):
            log.write({"number": number, "padding": "x" * 200})
        log.flush()
    os.close(writes)
    await asyncio.sleep(0)
