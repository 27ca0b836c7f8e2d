"""The client for `async` code: the methods of `Client` as coroutines."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sized
from types import TracebackType
from typing import Any

import httpx

from anomaly.client import wire
from anomaly.client.errors import OF_ONE_IMAGE, ServiceError
from anomaly.client.replies import Model, Score
from anomaly.client.retry import Retry


class AsyncClient:
    """Asks one service. Use it in an `async with` statement, or await `aclose`.

    Args:
        url: of the service, with the gateway's path prefix if there is one: `https://host/anomaly`.
        api_key: sent as X-API-Key.
        timeout: seconds that the service may be silent.
        retry: when to ask again; `NO_RETRY` for never.

    Raises:
        ValueError: the URL or the key cannot be one.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 10.0, retry: Retry | None = None
    ) -> None:
        self._http = httpx.AsyncClient(**wire.options(url, api_key, timeout))
        self._retry = retry or Retry()
        self._free = asyncio.Semaphore(wire.CONNECTIONS)
        self._abandoned: set[asyncio.Task[httpx.Response]] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Requests whose callers were cancelled end here."""
        for task in self._abandoned:
            task.cancel()
        try:
            await asyncio.gather(*self._abandoned, return_exceptions=True)
        finally:
            await self._http.aclose()

    async def score(
        self,
        image: wire.Image,
        *,
        model: str | None = None,
        alpha: float | None = None,
        fit: wire.Fit = "strict",
    ) -> Score:
        """Score one image; see `Client.score`."""
        png = image if isinstance(image, bytes) else await asyncio.to_thread(wire.read, image)
        return wire.score_reply(await self._ask(wire.score_request(png, model, alpha, fit)))

    async def score_many(
        self,
        images: Iterable[wire.Image],
        *,
        model: str | None = None,
        alpha: float | None = None,
        fit: wire.Fit = "strict",
        concurrency: int = 8,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> AsyncGenerator[Score | ServiceError, None]:
        """Score images, several at a time, in order; see `Client.score_many`.

        A generator of images that blocks holds up the event loop: requests get on between two images only.
        """
        if concurrency < 1:
            raise ValueError("concurrency must be at least 1")
        total = len(images) if isinstance(images, Sized) else None
        slots = asyncio.Semaphore(concurrency)
        waiting: deque[asyncio.Task[Score | ServiceError]] = deque()
        done = itertools.count(1)

        async def one(image: wire.Image) -> Score | ServiceError:
            async with slots:
                try:
                    return await self.score(image, model=model, alpha=alpha, fit=fit)
                except OF_ONE_IMAGE as error:
                    return error

        async def first() -> Score | ServiceError:
            result = await waiting[0]
            waiting.popleft()
            if on_progress is not None:
                on_progress(next(done), total)
            return result

        broken: list[Exception] = []
        try:
            for image in wire.until_broken(images, broken):
                waiting.append(asyncio.create_task(one(image)))
                await asyncio.sleep(0)
                while waiting and (waiting[0].done() or len(waiting) >= 2 * concurrency):
                    yield await first()
            while waiting:
                yield await first()
            if broken:
                raise broken[0]
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def reconstruction(self, score: Score | str, *, view: wire.View = "reconstruction", scale: int = 1) -> bytes:
        """Fetch what the model made of an image, as a PNG; see `Client.reconstruction`."""
        return wire.picture_reply(await self._ask(wire.reconstruction_request(score, view, scale)))

    async def models(self) -> tuple[Model, ...]:
        """List what the service serves; see `Client.models`."""
        return wire.models_reply(await self._ask(wire.MODELS_REQUEST))

    async def _ask(self, request: dict[str, Any]) -> httpx.Response:
        started = time.monotonic()
        for attempt in itertools.count():
            try:
                return await self._once(request)
            except ServiceError as error:
                wait = self._retry.wait(error, attempt, time.monotonic() - started)
                if wait is None:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _once(self, request: dict[str, Any]) -> httpx.Response:
        await self._free.acquire()
        task = asyncio.create_task(self._http.request(**request))
        task.add_done_callback(self._ended)
        try:
            # A cancellation that reaches httpx's pool may cost it a connection for ever, so none does.
            response = await asyncio.shield(task)
        except httpx.HTTPError as error:
            raise wire.transport_error(error, self._http.base_url) from error
        except asyncio.CancelledError:
            if not task.done():
                self._abandoned.add(task)
            raise
        return wire.check(response)

    def _ended(self, task: asyncio.Task[httpx.Response]) -> None:
        self._free.release()
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio complains of one that nobody asked for
