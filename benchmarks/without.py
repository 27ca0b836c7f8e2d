"""Run the service without one of its optimisations, to measure its gain: `python -m benchmarks.without NAME`.

Settings come from the environment, as for `python -m app`. Only for measuring: it reaches into the service's modules.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

from app import process
from app.concurrency import batcher
from app.http import batch, bodies, connection, middleware, multipart, server
from app.images import png
from app.inference import version
from app.telemetry import logs

Replace = Callable[[Any, str, Any], None]
"""Sets an attribute, as `setattr` does, but only one that exists."""


def _replies_in_two_pieces(replace: Replace) -> None:
    replace(connection.CoalescingTransport, "write", lambda self, data: self._transport.write(data))


def _every_png_checked_chunk_by_chunk(replace: Replace) -> None:
    replace(png, "_usual", lambda _png: b"")


def _every_image_queued_alone(replace: Replace) -> None:
    enqueue = batcher.MicroBatcher.enqueue

    def at_once(self: batcher.MicroBatcher[Any], item: Any) -> None:
        enqueue(self, item)
        self._admit(asyncio.get_running_loop())

    replace(batcher.MicroBatcher, "enqueue", at_once)


def _one_pass_at_once(replace: Replace) -> None:
    replace(batch, "PASSES_AT_ONCE", 1)


def _collector_looks_at_all(replace: Replace) -> None:
    replace(gc, "freeze", lambda: None)
    replace(process, "_COLLECT_AFTER", gc.get_threshold())


def _score_behind_the_framework(replace: Replace) -> None:
    async def through(self: middleware.RequestMiddleware, *given: Any) -> int:
        return await self._framework(*given)

    replace(middleware.RequestMiddleware, "_score_streamed", through)
    _every_score_in_messages(replace)


def _every_score_in_messages(replace: Replace) -> None:
    replace(server.ServerProtocol, "_takes_fast_path", lambda _self, _headers: False)


class _Timers:
    """Stands in for `app.concurrency.deadlines.Deadlines`, with a timer per operation."""

    def __init__(self, seconds: float, on_missed: Callable[[Any], object], _: object = None) -> None:
        self._seconds, self._on_missed = seconds, on_missed
        self._timers: dict[Any, asyncio.TimerHandle] = {}

    def begin(self, *keys: object) -> None:
        loop = asyncio.get_running_loop()
        for key in keys:
            self._timers[key] = loop.call_later(self._seconds, self._on_missed, key)

    def end(self, *keys: object) -> bool:
        timers = [self._timers.pop(key, None) for key in keys]
        for timer in timers:
            if timer is not None:
                timer.cancel()
        return None not in timers


def _a_timer_for_every_deadline(replace: Replace) -> None:
    replace(bodies, "Deadlines", _Timers)
    replace(batcher, "Deadlines", _Timers)


def _every_form_parsed_in_full(replace: Replace) -> None:
    replace(multipart, "_only_part", lambda _parameters, _body: None)


def _event_loop_in_between(replace: Replace) -> None:
    begin = batcher.MicroBatcher.__init__

    def patient(self: batcher.MicroBatcher[Any], *given: Any, **chosen: Any) -> None:
        # A delay above 0 makes the event loop request the next micro-batch; a delay this small adds no waiting time.
        begin(self, *given, **{**chosen, "max_delay": 1e-9})

    def run(self: version.ModelVersion, requests: list[Any], resolve: Any) -> None:
        detections = self._count_failure(functools.partial(self._detect, requests), len(requests))
        loop = resolve.args[0]
        loop.call_soon_threadsafe(self._on_batch_done, self, requests, detections, resolve)

    replace(batcher.MicroBatcher, "__init__", patient)
    replace(version.ModelVersion, "_run_batch", run)


def _a_write_for_every_log_line(replace: Replace) -> None:
    write = logs.AccessLog.write

    def at_once(self: logs.AccessLog, members: dict[str, object]) -> None:
        write(self, members)
        self.queue()

    replace(logs.AccessLog, "write", at_once)


TRICKS: dict[str, tuple[str, Callable[[Replace], None]]] = {
    "joined": (
        "header and body of a response are written in one system call (measured with `GET /models`)",
        _replies_in_two_pieces,
    ),
    "usual": ("PNGs with the usual header skip the check of each chunk", _every_png_checked_chunk_by_chunk),
    "together": ("requests that arrive in one event-loop iteration are queued together", _every_image_queued_alone),
    "timer": ("one timer for the deadlines of all bodies and scores", _a_timer_for_every_deadline),
    "passes": ("several forward passes per call from Python (images per second of batch requests)", _one_pass_at_once),
    "freeze": (
        "`gc.freeze` after the start, and rare garbage collection later (measured on 900 connections)",
        _collector_looks_at_all,
    ),
    "edge": ("`POST /score` is handled before the framework", _score_behind_the_framework),
    "whole": ("a `POST /score` whose body is complete needs no task and no ASGI messages", _every_score_in_messages),
    "chain": (
        "micro-batches go from the inference thread to the store without the event loop (measured on 16 connections)",
        _event_loop_in_between,
    ),
    "form": (
        "a form with one file is split without a general parser, on the fast path (measured with multipart bodies)",
        _every_form_parsed_in_full,
    ),
    "log": ("log lines are collected for 50 ms and written together", _a_write_for_every_log_line),
}
"""By name: a description of the optimisation, and the function that disables it."""


def run() -> int:
    """Disable the optimisation that the first argument names, and serve."""
    import app.__main__ as service  # it sets signal handlers

    TRICKS[sys.argv[1]][1](_replace)
    return service.main([])


def _replace(owner: Any, name: str, value: Any) -> None:
    getattr(owner, name)  # another name would change nothing
    setattr(owner, name, value)


if __name__ == "__main__":
    sys.exit(run())
