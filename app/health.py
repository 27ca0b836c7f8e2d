"""Liveness and readiness: the causes that `/readyz` reports, checked once per second also without requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from pydantic import BaseModel, Field

from app.inference.registry import Registry
from app.stores.reconstructions import Reconstructions
from app.telemetry.metrics import Metrics
from app.telemetry.writer import LineWriter

_log = logging.getLogger(__name__)
_CHECK_SECONDS = 1.0


class Readiness(BaseModel):
    """The reply of `GET /readyz`; the status code is 200 if ready, else 503."""

    ready: bool
    model: str
    version: int | None
    device: str
    store: Literal["up", "down"]
    problems: list[str] = Field(description="Why the service is not ready")


class Health:
    """The state of the service, from its parts.

    Args:
        registry: the model versions.
        reconstructions: the reconstruction store.
        metrics: get what a check finds.
        log: whose dropped lines are counted.

    Attributes:
        draining: whether the service is shutting down.
    """

    def __init__(self, registry: Registry, reconstructions: Reconstructions, metrics: Metrics, log: LineWriter) -> None:
        self.draining = False
        self._registry = registry
        self._reconstructions = reconstructions
        self._metrics = metrics
        self._log = log

    def begin_draining(self) -> None:
        """Report unready from now on."""
        self.draining = True

    def readiness(self) -> Readiness:
        """Return whether the service can score now, and why not."""
        version = self._registry.current(self._registry.default_model)
        problems = [*self._registry.problems(), *(["the service is shutting down"] if self.draining else [])]
        return Readiness(
            ready=not problems,
            model=self._registry.default_model,
            version=version.manifest.version if version else None,
            device=str(self._registry.device),
            store="up" if self._reconstructions.up else "down",
            problems=problems,
        )

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[None]:
        """Update the metrics of the readiness once per second while the block runs, in each worker process."""
        self._metrics.ready.set(self.readiness().ready)
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        loop, supervisor = asyncio.get_running_loop(), multiprocessing.parent_process()
        counted = reported = self._log.dropped
        while True:
            due = loop.time() + _CHECK_SECONDS
            await asyncio.sleep(_CHECK_SECONDS)
            self._metrics.event_loop_lag.observe(max(0.0, loop.time() - due))
            self._metrics.queue_images.set(self._registry.waiting)
            self._metrics.ready.set(self.readiness().ready)
            self._metrics.log_lines_dropped.inc(self._log.dropped - counted)
            counted = self._log.dropped
            if counted > reported and self._log.flush(timeout=0):  # before that, the log drops the warning as well
                _log.warning("log lines dropped", extra={"lines": counted - reported})
                reported = counted
            if supervisor is not None and not supervisor.is_alive():
                _log.error("the supervisor process has died: this worker stops")
                supervisor = None  # a second signal would cut short the shutdown that the first one begins
                signal.raise_signal(signal.SIGTERM)
            try:
                await self._reconstructions.check_when_quiet()
            except Exception:  # the next checks must follow
                _log.exception("the reconstruction store could not be checked")
