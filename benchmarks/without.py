"""The service with one of its tricks taken out, to see what that one is worth: `python -m benchmarks.without NAME`.

Settings come from the environment, as for `python -m app`. Only for measuring: it reaches into the service's modules.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import app.__main__ as service
from app import main
from app.concurrency import batcher
from app.http import bodies, middleware, server
from app.images import png
from app.inference import version
from app.scoring import batch, score
from app.telemetry import logs, metrics


def _replies_in_two_pieces() -> None:
    server._Joined = lambda transport, _loop: transport


def _every_png_checked_chunk_by_chunk() -> None:
    png._usual = lambda _png: b""


def _every_image_queued_alone() -> None:
    arrive, take_in = score.Scorer._arrive, score.Scorer._take_in

    def at_once(self: score.Scorer, serving: version.Serving, *given: Any, **chosen: Any) -> Any:
        future = arrive(self, serving, *given, **chosen)
        take_in(self, serving)
        return future

    score.Scorer._arrive = at_once
    score.Scorer._take_in = lambda _self, _serving: None


def _one_pass_at_once() -> None:
    batch.PASSES_AT_ONCE = 1


def _collector_looks_at_all() -> None:
    gc.freeze = lambda: None
    main._COLLECT_AFTER = gc.get_threshold()


def _score_behind_the_framework() -> None:
    async def through(self: middleware.Edge, *given: Any) -> int:
        return await self._framework(*given)

    middleware.Edge._fast = through
    _every_score_in_messages()


def _every_score_in_messages() -> None:
    server.Protocol._may_be_whole = lambda _self: False


class _Timers:
    """Stands in for `app.concurrency.deadlines.Deadlines`, with a timer for each thing."""

    def __init__(self, seconds: float, missed: Callable[[Any], object]) -> None:
        self._seconds, self._missed = seconds, missed
        self._timers: dict[Any, asyncio.TimerHandle] = {}

    def begin(self, key: object) -> None:
        self._timers[key] = asyncio.get_running_loop().call_later(self._seconds, self._missed, key)

    def end(self, key: object) -> None:
        if key in self._timers:
            self._timers.pop(key).cancel()


def _a_timer_for_every_deadline() -> None:
    bodies.Deadlines = batcher.Deadlines = _Timers


def _every_form_parsed_in_full() -> None:
    bodies._only_part = lambda _parameters, _body: None


def _event_loop_in_between() -> None:
    begin = batcher.MicroBatcher.__init__

    def patient(self: batcher.MicroBatcher[Any, Any], *given: Any, **chosen: Any) -> None:
        # Above 0, and yet no delay: the next micro-batch is asked for by the event loop.
        begin(self, *given, **{**chosen, "max_delay": 1e-9})

    def run(self: version.Serving, items: list[Any], done: Any) -> None:
        detections = self._counted(functools.partial(self._detect, items), len(items))
        loop = done.args[0]
        loop.call_soon_threadsafe(self._finish, self, items, detections, done)

    batcher.MicroBatcher.__init__ = patient
    version.Serving._run = run


def _every_value_counted_at_once() -> None:
    metrics._MOST_HELD = 1


def _a_write_for_every_log_line() -> None:
    write = logs.AccessLog.write

    def at_once(self: logs.AccessLog, members: dict[str, object]) -> None:
        write(self, members)
        self.flush()

    logs.AccessLog.write = at_once


TRICKS: dict[str, tuple[str, Callable[[], None]]] = {
    "joined": (
        "head and body of a reply leave in one system call (measured with `GET /models`)",
        _replies_in_two_pieces,
    ),
    "usual": ("a plain PNG in its usual form is known by its first 33 bytes", _every_png_checked_chunk_by_chunk),
    "together": ("what arrives in one turn of the event loop is queued together", _every_image_queued_alone),
    "timer": ("one timer for all deadlines, of bodies and of scores", _a_timer_for_every_deadline),
    "passes": ("several forward passes without Python (images a second of batch requests)", _one_pass_at_once),
    "freeze": (
        "the collector looks away: `gc.freeze` after the start, and seldom later (measured on 900 connections)",
        _collector_looks_at_all,
    ),
    "edge": ("`POST /score` is answered before the framework", _score_behind_the_framework),
    "whole": ("a `POST /score` that came whole needs no task and no messages", _every_score_in_messages),
    "chain": (
        "from the queue to the store without the event loop (measured on 16 connections)",
        _event_loop_in_between,
    ),
    "counts": ("histograms count when somebody looks, or for 500 values at once", _every_value_counted_at_once),
    "form": ("a form with one file is cut, not parsed (measured with multipart bodies)", _every_form_parsed_in_full),
    "log": ("log lines are gathered for 50 ms and written at once", _a_write_for_every_log_line),
}
"""By name: what the trick is, and how it is taken out."""


def run() -> int:
    """Take out the trick that the first argument names, and serve."""
    TRICKS[sys.argv[1]][1]()
    return service.main()


if __name__ == "__main__":
    sys.exit(run())
