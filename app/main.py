"""Puts the service together. The only place where anything is made; importing it does nothing."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app import settings
from app.health import watch
from app.http.auth import ApiKeys
from app.http.dependencies import Services
from app.http.middleware import Edge
from app.http.routes import ROUTERS
from app.inference.detector import share_heaps
from app.inference.registry import Engine
from app.models.repository import Repository
from app.problems import InternalError, InvalidParameter, Problem, from_status, render
from app.scoring.batch import BulkScorer
from app.scoring.score import Scorer
from app.scoring.verdict import Replies
from app.settings import Settings
from app.stores import Store, open_store
from app.stores.reconstructions import Reconstructions
from app.stores.record import SIZE_BOUND
from app.telemetry.logs import AccessLog, LineWriter, configure
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

_COLLECT_AFTER = 20_000, 20, 50
"""New objects before the youngest generation is collected, collections of it before the next one is, and so on."""


def create_app(settings: Settings, *, store: Store | None = None, log_writer: LineWriter | None = None) -> Edge:
    """Make the application; its lifespan loads the models.

    Args:
        settings: what the operator chose.
        store: used instead of the one that `settings.store_url` names.
        log_writer: writes the access log. Default: standard output.

    Raises:
        DeviceError: the device that was asked for is not there.
        KeysError: the file of the API keys cannot be used.
        StoreError: the store URL names no kind of store.
    """
    metrics = Metrics()
    keys = _keys(settings)
    reconstructions = Reconstructions(
        store or _store(settings),
        metrics,
        timeout=settings.store_timeout_ms / 1000,
        max_waiting=settings.queue_max_images,
    )
    replies = Replies(reconstructions, metrics, settings.root_path)
    engine = Engine(Repository(settings.model_store), settings, metrics, replies.finish)
    scorer = Scorer(engine, metrics, settings)
    bulk = BulkScorer(engine, reconstructions, metrics, settings)
    log_writer = log_writer or LineWriter()
    services = Services(engine, reconstructions, scorer, bulk, metrics)
    app = FastAPI(
        title="Reconstruction anomaly service",
        description="Says how badly an autoencoder redraws an image, and whether that is an anomaly.",
        version="0.1.0",
        lifespan=_lifespan,
        root_path=settings.root_path,
        docs_url=None,  # `routes` serves it, from here instead of from a CDN
        redoc_url=None,
        # A redirect would name whatever host the request named.
        redirect_slashes=False,
    )
    app.state.services, app.state.settings, app.state.log_writer = services, settings, log_writer
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_failure)
    log = AccessLog(log_writer, enabled=settings.log_requests)
    return Edge(app, score=scorer, metrics=metrics, log=log, keys=keys)


def check(settings: Settings) -> None:
    """Find out before any process is started whether the store and the API keys are as they should be.

    Raises:
        KeysError: the file of the API keys cannot be used.
        StoreError: the store's URL cannot be used.
    """
    _keys(settings)
    _store(settings)


def _keys(settings: Settings) -> ApiKeys | None:
    return None if settings.api_keys_file is None else ApiKeys(settings.api_keys_file)


def _store(settings: Settings) -> Store:
    return open_store(
        settings.store_url,
        ttl_seconds=settings.store_ttl_seconds,
        max_bytes=settings.store_max_bytes,
        entry_bytes=SIZE_BOUND,
        password_file=settings.store_password_file,
        timeout=settings.store_timeout_ms / 1000,
    )


def from_environment() -> Edge:
    """Make the application from the environment: the factory that uvicorn calls."""
    share_heaps()
    chosen = settings.from_environment()
    return create_app(chosen, log_writer=configure(chosen.log_level))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    async with AsyncExitStack() as stack:
        stack.push_async_callback(services.reconstructions.aclose)
        await services.reconstructions.check()
        stack.push_async_callback(services.scorer.aclose)
        stack.push_async_callback(services.engine.aclose)
        await services.engine.start()
        await stack.enter_async_context(
            watch(
                services.engine,
                services.reconstructions,
                services.metrics,
                app.state.log_writer,
                lambda: services.readiness().ready,
            )
        )
        stack.enter_context(_draining(services, app.state.settings.drain_seconds))
        seconds = _process_age()
        services.metrics.start_seconds.set(seconds)
        readiness = services.readiness()
        _log.info("started", extra={"seconds": round(seconds, 3), **readiness.model_dump()})
        # What is alive now stays alive: the collector need not look at it again with every generation. What comes
        # later is mostly gone without it: thousands of open connections need not be looked at every few requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        yield


@contextmanager
def _draining(services: Services, seconds: float) -> Iterator[None]:
    """While entered, SIGTERM makes the service unready at once and ends it `seconds` later; a second one, now."""
    if seconds == 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, previous = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

    def begin(number: int, frame: FrameType | None) -> None:
        finish = functools.partial(previous, number, frame) if callable(previous) else lambda: None
        if services.draining:
            finish()
        services.draining = True
        loop.call_soon_threadsafe(loop.call_later, seconds, finish)

    signal.signal(signal.SIGTERM, begin)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _process_age() -> float:
    """Return the seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


async def _on_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    request.scope.get("facts", {})["problem"] = problem.type
    body = render(problem, request.scope.get("request_id"))
    headers = problem.headers()
    if problem.status in (408, 413):
        headers["connection"] = "close"  # what is left of the body is not waited for
    return Response(body, problem.status, headers=headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return await _on_problem(request, InvalidParameter(f"{name[:40]}: {first['msg']}"))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allow = (error.headers or {}).get("Allow", "")
    if "HEAD" not in allow:  # `edge` sees to it
        allow = allow.replace("GET", "GET, HEAD")
    detail = "" if error.status_code in (404, 405) else str(error.detail)
    return await _on_problem(request, from_status(error.status_code, detail, allow))


async def _on_failure(request: Request, _: Exception) -> Response:
    # What happened is raised again after this answer, and the edge logs it.
    return await _on_problem(request, InternalError())
