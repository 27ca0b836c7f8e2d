"""Checks once per second what no request shows: event loop, queue, readiness, log, the store, a dead supervisor.

Knows: what to look at. Does not know: who reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from app.inference.registry import Engine
from app.stores.reconstructions import Reconstructions
from app.telemetry.logs import LineWriter
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)
_EVERY = 1.0


@asynccontextmanager
async def watch(
    engine: Engine, reconstructions: Reconstructions, metrics: Metrics, log: LineWriter, ready: Callable[[], bool]
) -> AsyncIterator[None]:
    """Look once a second while entered. `ready` says what /readyz would, which each worker must tell unasked."""
    metrics.ready.set(ready())
    task = asyncio.create_task(_look(engine, reconstructions, metrics, log, ready))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _look(
    engine: Engine, reconstructions: Reconstructions, metrics: Metrics, log: LineWriter, ready: Callable[[], bool]
) -> None:
    counted = reported = log.dropped
    loop, supervisor = asyncio.get_running_loop(), multiprocessing.parent_process()
    while True:
        due = loop.time() + _EVERY
        await asyncio.sleep(_EVERY)
        metrics.loop_lag.observe(max(0.0, loop.time() - due))
        metrics.queue_images.set(engine.waiting)
        metrics.ready.set(ready())
        metrics.log_lines_dropped.inc(log.dropped - counted)
        counted = log.dropped
        if counted > reported and log.flush(timeout=0):  # before, the warning would be dropped too
            _log.warning("log lines dropped", extra={"lines": counted - reported})
            reported = counted
        if supervisor is not None and not supervisor.is_alive():
            _log.error("the process that started this worker is gone: stopping")
            supervisor = None  # a second signal would cut short what the first one begins
            signal.raise_signal(signal.SIGTERM)
        try:
            await reconstructions.check_when_quiet()
        except Exception:  # looking must go on
            _log.exception("the store could not be looked at")
