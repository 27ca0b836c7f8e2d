"""The composition root: the only place that builds the service's objects. Importing it does nothing."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI

from app import __version__, process, settings
from app.health import Health
from app.http import errors, listening
from app.http.auth import ApiKeys, KeysError
from app.http.batch import BatchHandler
from app.http.cors import Cors
from app.http.dependencies import Services
from app.http.examples import Api
from app.http.hosts import Hosts
from app.http.inference_protocol.scoring import InferHandler
from app.http.middleware import RequestMiddleware
from app.http.routes import ROUTERS
from app.http.score import ScoreHandler
from app.inference.device import DeviceError
from app.inference.loader import VersionLoader
from app.inference.registry import Registry
from app.models.provenance import Provenance, ProvenanceConfigurationError
from app.models.repository import Repository
from app.scoring.batch import BatchScorer
from app.scoring.review.folder import ReviewError, ReviewFolder
from app.scoring.review.queue import ReviewQueue
from app.scoring.score import Scorer
from app.scoring.validity.monitor import ValidityMonitor
from app.settings import Settings
from app.stores import Store, StoreError, open_store
from app.stores.reconstructions import Reconstructions
from app.stores.records import MAX_RECORD_BYTES
from app.telemetry import traces as tracing
from app.telemetry.logs import AccessLog, configure, text_renderer
from app.telemetry.metrics import Metrics
from app.telemetry.traces import Traces, TracesError
from app.telemetry.writer import LineWriter

_log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long a shutdown waits, after the server has closed its connections, for the model threads, and then for the
store, the review queue and the traces together."""
CONFIGURATION_ERRORS = DeviceError, KeysError, ProvenanceConfigurationError, ReviewError, StoreError, TracesError
"""Errors of `create_app` and `check` if a setting, or a file that it names, cannot be used."""
_STORE = "a write to the reconstruction store"


class Application(RequestMiddleware):
    """The application that a server runs.

    Args:
        framework: handles all requests but `POST /score`.
        services: the objects that the routes use.
        log, keys, cors, hosts, traces: as for `RequestMiddleware`.
        probe_port: port on which only probes are answered. None: no port.
    """

    def __init__(
        self,
        framework: FastAPI,
        services: Services,
        *,
        log: AccessLog,
        keys: ApiKeys | None,
        cors: Cors | None,
        hosts: Hosts | None,
        traces: Traces | None,
        probe_port: int | None,
    ) -> None:
        super().__init__(
            framework,
            score=services.score,
            metrics=services.metrics,
            log=log,
            keys=keys,
            cors=cors,
            hosts=hosts,
            traces=traces,
        )
        self.framework, self.services = framework, services
        self.probe_port = probe_port

    @property
    def draining(self) -> bool:
        """Whether the service will soon shut down."""
        return self.services.health.draining

    def begin_shutdown(self) -> None:
        """Bound the time that batch requests take from now on."""
        self.services.batch.begin_shutdown()


def create_app(
    settings: Settings,
    *,
    store: Store | None = None,
    log_writer: LineWriter | None = None,
    on_stopped: Callable[[bool, bool], object] = lambda *_: None,
    clock: Callable[[], float] = time.monotonic,
    traces: Traces | None = None,
) -> Application:
    """Build the application; its lifespan loads the models.

    Args:
        settings: of the operator.
        store: backend of the reconstruction store. Default: the one that `settings.store_url` names.
        log_writer: writes the access log. Default: standard output.
        on_stopped: called at the end of the shutdown with whether all work was finished, and whether the start was.
        clock: monotonic seconds.
        traces: records spans, and is closed by the shutdown. None: no traces.

    A setting that cannot be used is one of `CONFIGURATION_ERRORS`.
    """
    metrics, log_writer = Metrics(), log_writer or LineWriter()
    reconstructions = Reconstructions(
        store or _store(settings, metrics),
        metrics,
        timeout=settings.store_timeout_ms / 1000,
        max_waiting=settings.queue_max_images,
        clock=clock,
    )
    validity = ValidityMonitor(reconstructions, metrics, settings.validity_limit)
    review = _review(settings, metrics)
    scorer = Scorer(reconstructions, metrics, settings.root_path, validity, traces=traces, review=review)
    loader = VersionLoader(
        Repository(settings.model_store, _provenance(settings)),
        settings,
        metrics,
        prepare=scorer.prepare,
        on_batch_done=scorer.on_batch_done,
    )
    registry = Registry(loader, settings, metrics, clock)
    score = ScoreHandler(registry, scorer, settings)
    batch_scorer = BatchScorer(reconstructions, metrics, settings.root_path, validity, review)
    batch = BatchHandler(registry, batch_scorer, metrics, settings)
    services = Services(
        registry=registry,
        reconstructions=reconstructions,
        score=score,
        batch=batch,
        infer=InferHandler(
            registry=registry,
            scorer=scorer,
            batch_scorer=batch_scorer,
            score=score,
            batch=batch,
            metrics=metrics,
            settings=settings,
        ),
        metrics=metrics,
        validity=validity,
        review=review,
        health=Health(registry, reconstructions, metrics, log_writer),
    )
    app = Api(
        title="Reconstruction anomaly service",
        description="Returns how badly an autoencoder reconstructs an image, and whether that is an anomaly.",
        version=__version__,
        lifespan=functools.partial(
            _lifespan, services=services, settings=settings, on_stopped=on_stopped, traces=traces
        ),
        root_path=settings.root_path,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        generate_unique_id_function=lambda route: route.name,  # short names in generated clients
        openapi_url=None,  # the route of `operation` rejects unknown parameters
        docs_url=None,  # the web routes serve the page, without a CDN
        redoc_url=None,
        # A redirect would contain the host that the request names.
        redirect_slashes=False,
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    errors.add_handlers(app)
    origins = [origin for origin in settings.cors_origins.split(",") if origin]
    names = [name for name in settings.allowed_hosts.split(",") if name]
    cors = Cors(origins) if origins else None
    hosts = Hosts(names, origins) if names or settings.api_keys_file is None else None
    log = AccessLog(log_writer, enabled=settings.log_requests, text=text_renderer(settings.log_format, log_writer))
    keys, probe_port = _keys(settings, clock), settings.probe_port
    return Application(app, services, log=log, keys=keys, cors=cors, hosts=hosts, traces=traces, probe_port=probe_port)


def check(settings: Settings) -> None:
    """Check store URL, API keys, rules about model versions, review queue and traces before any process is started.

    A setting that cannot be used is one of `CONFIGURATION_ERRORS`.
    """
    _keys(settings)
    _provenance(settings)
    _review(settings, None)
    # Metrics of the supervisor would count as those of a worker that is never ready.
    _store(settings, None)
    tracing.check()


def from_environment() -> Application:
    """Build the application from the environment for uvicorn, or log why it cannot be built and end the process."""
    process.limit_heaps()
    chosen = settings.from_environment()
    log_writer = configure(chosen.log_level, chosen.log_format)
    try:
        check(chosen)  # before the metrics of this process: each failed start of a worker would leave their files
        traces = tracing.from_environment(__version__)
        return create_app(chosen, log_writer=log_writer, on_stopped=process.exit_unless_finished, traces=traces)
    except CONFIGURATION_ERRORS as error:
        _log.error("cannot start: %s", error)
        sys.exit(process.failed_start())


def _keys(settings: Settings, clock: Callable[[], float] = time.monotonic) -> ApiKeys | None:
    return None if settings.api_keys_file is None else ApiKeys(settings.api_keys_file, clock=clock)


def _provenance(settings: Settings) -> Provenance:
    return Provenance(settings.model_signature, settings.model_public_key_file, settings.model_digests_file)


def _review(settings: Settings, metrics: Metrics | None) -> ReviewQueue | None:
    if settings.review_dir is None:
        return None
    folder = ReviewFolder(settings.review_dir, settings.review_max_images, settings.review_max_bytes)
    share, near = settings.review_share, settings.review_near
    return None if metrics is None else ReviewQueue(folder, metrics, share=share, near=near)


def _store(settings: Settings, metrics: Metrics | None) -> Store:
    events = {}
    if metrics is not None:
        events["on_reopened"] = metrics.reconstruction_store_reopened.inc
        events["on_damaged"] = metrics.reconstruction_store_damaged.inc
    return open_store(
        settings.store_url,
        ttl_seconds=settings.store_ttl_seconds,
        max_bytes=settings.store_max_bytes,
        entry_bytes=MAX_RECORD_BYTES,
        password_file=settings.store_password_file,
        timeout=settings.store_timeout_ms / 1000,
        shared=settings.workers > 1,
        **events,
    )


@asynccontextmanager
async def _lifespan(
    _: FastAPI,
    services: Services,
    settings: Settings,
    on_stopped: Callable[[bool, bool], object],
    traces: Traces | None,
) -> AsyncIterator[None]:
    started = False
    try:
        async with AsyncExitStack() as stack:
            await services.reconstructions.check()
            await services.registry.start()
            await stack.enter_async_context(services.health.watch())
            await stack.enter_async_context(services.validity.watch(services.registry))
            stack.enter_context(process.drain_on_sigterm(services.health.begin_draining, settings.drain_seconds))
            seconds = process.process_age()
            if seconds is not None:
                services.metrics.start_duration.set(seconds)
            facts = {"url": listening.url(settings.host, settings.port), "seconds": seconds and round(seconds, 3)}
            _log.info("started", extra={**facts, **services.health.readiness().model_dump()})
            process.tune_garbage_collector()
            started = True
            yield
    finally:
        on_stopped(await _close(services, traces), started)


async def _close(services: Services, traces: Traces | None) -> bool:
    """End all threads. Return False if work that did not finish in time was abandoned."""
    services.score.close()
    services.pictures.close(timeout=0)
    finished = await services.registry.aclose(CLOSE_SECONDS)
    if not finished:
        _log.error("shutdown abandoned a forward pass, a version load or a read of the model store: it took too long")
    closing: dict[str, Awaitable[bool]] = {_STORE: services.reconstructions.aclose(CLOSE_SECONDS)}
    if services.review is not None:
        closing["images of the review queue"] = asyncio.to_thread(services.review.close, CLOSE_SECONDS)
    if traces is not None:
        closing["spans that the collector did not accept"] = asyncio.to_thread(traces.close, CLOSE_SECONDS)
    closed = zip(closing, await asyncio.gather(*closing.values(), return_exceptions=True), strict=True)
    abandoned = {work: found for work, found in closed if found is not True}
    for work, found in abandoned.items():
        _log.error("shutdown abandoned %s: it failed or took too long", work, exc_info=found or None)
    process.remove_abandoned_metrics_folder()
    _log.info("stopped")
    return finished and _STORE not in abandoned
