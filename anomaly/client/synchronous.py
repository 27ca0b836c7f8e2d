"""The client that blocks. Safe to share between threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import httpx

from anomaly.client import wire
from anomaly.client.errors import OF_ONE_IMAGE, ServiceError
from anomaly.client.replies import Model, Score
from anomaly.client.retry import Retry


class Client:
    """Asks one service. Use it in a `with` statement, or call `close`.

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
        self._http = httpx.Client(**wire.options(url, api_key, timeout))
        self._retry = retry or Retry()
        self._never = threading.Event()
        self._closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        self._http.close()

    def score(
        self,
        image: wire.Image,
        *,
        model: str | None = None,
        alpha: float | None = None,
        fit: wire.Fit = "strict",
    ) -> Score:
        """Score one image.

        Args:
            image: a PNG, as bytes or as a path.
            model: `name` or `name@version`; the service's default model unless told.
            alpha: another false-alarm rate for this verdict.
            fit: `mnist` makes an image of any size into a digit as MNIST has them.

        Raises:
            ServiceError: one of its kinds says why there is no score.
        """
        return self._score(image, model, alpha, fit, self._never)

    def score_many(
        self,
        images: Iterable[wire.Image],
        *,
        model: str | None = None,
        alpha: float | None = None,
        fit: wire.Fit = "strict",
        concurrency: int = 8,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> Generator[Score | ServiceError, None, None]:
        """Score images, several at a time. Yields in the order of `images`, as soon as each is there.

        What is wrong with one image (no PNG, wrong size, unreadable file) is yielded as its result. What would befall
        every other image as well (nobody listens, an unknown model, a missing key) is raised.

        Args:
            images: PNGs; taken as they are needed, so a generator over a million files is fine. Up to twice
                `concurrency` are taken before the first result is yielded. When taking one fails, the results of
                those before it come first, then what was raised. Leaving before the end waits for no reply.
            model: see `score`.
            alpha: see `score`.
            fit: see `score`.
            concurrency: most requests under way at once.
            on_progress: is told after each image how many are done, and how many there are where that is known.

        Raises:
            ServiceError: the service does not answer, or answers so that asking on is useless.
        """
        if concurrency < 1:
            raise ValueError("concurrency must be at least 1")
        total = len(images) if isinstance(images, Sized) else None
        stop = threading.Event()
        over: list[int] = []  # the places of images whose errors would befall all behind them
        waiting: deque[Future[Score | ServiceError]] = deque()
        done = itertools.count(1)

        def one(place: int, image: wire.Image) -> Score | ServiceError:
            if over and place > min(over):
                raise ServiceError("not asked: an image before this one has ended the run")
            try:
                return self._score(image, model, alpha, fit, stop)
            except OF_ONE_IMAGE as error:
                return error
            except ServiceError:
                over.append(place)
                raise

        def first() -> Score | ServiceError:
            result = waiting.popleft().result()
            if on_progress is not None:
                on_progress(next(done), total)
            return result

        broken: list[Exception] = []
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="score")
        try:
            for place, image in enumerate(wire.until_broken(images, broken)):
                waiting.append(pool.submit(one, place, image))
                while waiting and (waiting[0].done() or len(waiting) >= 2 * concurrency):
                    yield first()
            while waiting:
                yield first()
            if broken:
                raise broken[0]
        finally:
            # A silent service must not hold whoever leaves early; Python itself waits for the threads at its end.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def reconstruction(self, score: Score | str, *, view: wire.View = "reconstruction", scale: int = 1) -> bytes:
        """Fetch what the model made of an image, as a PNG.

        Args:
            score: from `score`, or its id.
            view: which picture.
            scale: how many times its size, 1 to 16.

        Raises:
            ReconstructionNotFound: it was never kept, or its time is over.
            ServiceError: one of the other kinds says why there is no picture.
            ValueError: the score was not kept.
        """
        return wire.picture_reply(self._ask(wire.reconstruction_request(score, view, scale), self._never))

    def models(self) -> tuple[Model, ...]:
        """List what the service serves.

        Raises:
            ServiceError: one of its kinds says why there is no list.
        """
        return wire.models_reply(self._ask(wire.MODELS_REQUEST, self._never))

    def _score(
        self, image: wire.Image, model: str | None, alpha: float | None, fit: wire.Fit, stop: threading.Event
    ) -> Score:
        return wire.score_reply(self._ask(wire.score_request(wire.read(image), model, alpha, fit), stop))

    def _ask(self, request: dict[str, Any], stop: threading.Event) -> httpx.Response:
        started = time.monotonic()
        for attempt in itertools.count():
            try:
                return self._once(request)
            except ServiceError as error:
                wait = self._retry.wait(error, attempt, time.monotonic() - started)
                if wait is None or stop.wait(wait):
                    raise
        raise AssertionError("unreachable")

    def _once(self, request: dict[str, Any]) -> httpx.Response:
        try:
            response = self._http.request(**request)
        except httpx.HTTPError as error:
            raise wire.transport_error(error, self._http.base_url) from error
        if self._closed:
            # Made while `close` ran, by a thread that was left early: httpx has forgotten this connection.
            response.extensions["network_stream"].close()
        return wire.check(response)
