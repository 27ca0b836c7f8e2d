"""The client for asyncio: the methods of `Client` as coroutines."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Iterable
from types import TracebackType

import httpx

from anomaly.client import images as forms
from anomaly.client import parallel, wire
from anomaly.client.errors import ConnectionFailed, Problem, ServiceError
from anomaly.client.images import Array, Image
from anomaly.client.replies import Calibration, Model, Readiness, Score, Validity
from anomaly.client.retry import Retry
from anomaly.client.tracing import traced


class AsyncClient:
    """A client of one service. Use it in an `async with` statement, or await `aclose`.

    Args:
        url: address of the service, with the gateway's path prefix if there is one: `https://host/anomaly`.
            Default: `ANOMALY_URL`, else `http://127.0.0.1:8000`.
        api_key: API key, sent as `X-API-Key`. Default: the key of `ANOMALY_KEY_FILE` or `ANOMALY_KEY` if `url` is
            not given either, else none.
        timeout: seconds after which a silent service is a timeout.
        retry: when to repeat a request; `NO_RETRY` for never.

    Raises:
        ValueError: the address, the key, or a variable of the environment is not valid.
    """

    def __init__(
        self, url: str | None = None, *, api_key: str | None = None, timeout: float = 10.0, retry: Retry | None = None
    ) -> None:
        self._http = httpx.AsyncClient(**wire.options(url, api_key, timeout))
        self._retry = retry or Retry()
        self._connected = False
        self._free = asyncio.Semaphore(wire.CONNECTIONS)
        self._abandoned: set[asyncio.Task[httpx.Response]] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections, and cancel the requests whose callers were cancelled."""
        for task in self._abandoned:
            task.cancel()
        try:
            await asyncio.gather(*self._abandoned, return_exceptions=True)
        finally:
            await self._http.aclose()

    async def score(
        self, image: Image, *, model: str | None = None, alpha: float | None = None, fit: wire.Fit | None = None
    ) -> Score:
        """Score one image; see `Client.score`."""
        png = image if isinstance(image, bytes) else await asyncio.to_thread(forms.read, image)
        return wire.score_reply(await self._request(wire.score_request(png, model, alpha, fit)))

    def score_many(
        self,
        images: Iterable[Image],
        *,
        model: str | None = None,
        alpha: float | None = None,
        fit: wire.Fit | None = None,
        concurrency: int = 8,
        on_progress: parallel.Progress | None = None,
    ) -> AsyncGenerator[Score | ServiceError, None]:
        """Score images concurrently, in order; see `Client.score_many`.

        A generator of images that blocks also blocks the event loop.
        """

        async def call(image: Image) -> Score:
            return await self.score(image, model=model, alpha=alpha, fit=fit)

        return parallel.with_tasks(call, images, concurrency, on_progress)

    async def score_array(
        self, images: Array, *, model: str | None = None, alpha: float | None = None
    ) -> list[Score | Problem]:
        """Score an array of images with batch requests; see `Client.score_array`."""
        results: list[Score | Problem] = []
        for request in wire.batch_requests(images, model, alpha):
            results += wire.batch_reply(await self._request(request))
        return results

    async def reconstruction(self, score: Score | str, *, view: wire.View = "reconstruction", scale: int = 1) -> bytes:
        """Return a picture of a score as a PNG; see `Client.reconstruction`."""
        return wire.picture_reply(await self._request(wire.reconstruction_request(score, view, scale)))

    async def models(self) -> tuple[Model, ...]:
        """Return the models of the service."""
        return wire.models_reply(await self._request(wire.MODELS_REQUEST))

    async def model_card(self, model: str | None = None) -> str:
        """Return the model card of a version, as Markdown; see `Client.model_card`."""
        return (await self._request(wire.model_card_request(*await self._version(model)))).text

    async def calibration(self, model: str | None = None) -> Calibration:
        """Return the calibration of a version; see `Client.calibration`."""
        return wire.calibration_reply(await self._request(wire.calibration_request(*await self._version(model))))

    async def validity(self, model: str | None = None) -> Validity:
        """Return whether images still score like the calibration images; see `Client.validity`."""
        name = await self._default() if model is None else model
        return wire.validity_reply(await self._request(wire.validity_request(name)))

    async def ready(self) -> Readiness:
        """Return whether the service can score; see `Client.ready`."""
        return wire.readiness_reply(await self._send(wire.READY_REQUEST))

    async def _default(self) -> str:
        return next((each.name for each in await self.models() if each.is_default), "")

    async def _version(self, model: str | None) -> tuple[str, str]:
        name = await self._default() if model is None else model
        name, _, version = name.partition("@")
        return name, version or wire.version_reply(await self._request(wire.manifest_request(name)))

    async def _request(self, request: wire.Request) -> httpx.Response:
        started = time.monotonic()
        for attempt in itertools.count():
            try:
                return wire.check(await self._send(request))
            except ServiceError as error:
                if isinstance(error, ConnectionFailed) and not self._connected:
                    raise
                wait = self._retry.wait(error, attempt, time.monotonic() - started)
                if wait is None:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _send(self, request: wire.Request) -> httpx.Response:
        await self._free.acquire()
        task = asyncio.create_task(self._http.request(**traced(request)))
        task.add_done_callback(self._on_request_done)
        try:
            # A cancellation inside httpx's pool can leak a connection, so the request itself is not cancelled.
            response = await asyncio.shield(task)
        except httpx.HTTPError as error:
            found = wire.transport_error(error, self._http.base_url)
            self._connected |= not isinstance(found, ConnectionFailed)
            raise found from error
        except asyncio.CancelledError:
            if not task.done():
                self._abandoned.add(task)
            raise
        self._connected = True
        return response

    def _on_request_done(self, task: asyncio.Task[httpx.Response]) -> None:
        self._free.release()
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio logs an exception that nothing has retrieved
