"""Run the calls of `score_many` concurrently and yield their results in order: once with threads, once with tasks."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor

from anomaly.client.errors import OF_ONE_IMAGE, ServiceError
from anomaly.client.images import Image
from anomaly.client.replies import Score

Progress = Callable[[int, int | None], None]
"""Called after each image with the number of finished images, and the number of all images if it is known."""


def with_threads(
    score: Callable[[Image, threading.Event], Score],
    images: Iterable[Image],
    concurrency: int,
    on_progress: Progress | None,
) -> Generator[Score | ServiceError, None, None]:
    """Yield the result of each image in order; see `Client.score_many`.

    Args:
        score: function that scores one image; it stops retrying once the event is set.
        images: images to score.
        concurrency: maximum number of concurrent calls.
        on_progress: callback.
    """
    total = _check(concurrency, images)
    stop = threading.Event()
    failed: list[int] = []  # places of the images whose errors end the run
    pending: deque[Future[Score | ServiceError]] = deque()
    done = itertools.count(1)

    def call(place: int, image: Image) -> Score | ServiceError:
        if failed and place > min(failed):
            raise ServiceError("not sent: the error of an earlier image ended the run")
        try:
            return score(image, stop)
        except OF_ONE_IMAGE as error:
            return error
        except ServiceError:
            failed.append(place)
            raise

    def first() -> Score | ServiceError:
        result = pending.popleft().result()
        if on_progress is not None:
            on_progress(next(done), total)
        return result

    errors: list[Exception] = []
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="score")
    try:
        for place, image in enumerate(_until_error(images, errors)):
            pending.append(pool.submit(call, place, image))
            while pending and (pending[0].done() or len(pending) >= 2 * concurrency):
                yield first()
        while pending:
            yield first()
        if errors:
            raise errors[0]
    finally:
        # Closing the generator must not wait for a silent service. Python joins the threads when it exits.
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


async def with_tasks(
    score: Callable[[Image], Awaitable[Score]],
    images: Iterable[Image],
    concurrency: int,
    on_progress: Progress | None,
) -> AsyncGenerator[Score | ServiceError, None]:
    """Yield the result of each image in order; see `AsyncClient.score_many`.

    Args:
        score: coroutine function that scores one image.
        images: images to score.
        concurrency: maximum number of concurrent calls.
        on_progress: callback.
    """
    total = _check(concurrency, images)
    slots = asyncio.Semaphore(concurrency)
    pending: deque[asyncio.Task[Score | ServiceError]] = deque()
    done = itertools.count(1)

    async def call(image: Image) -> Score | ServiceError:
        async with slots:
            try:
                return await score(image)
            except OF_ONE_IMAGE as error:
                return error

    async def first() -> Score | ServiceError:
        result = await pending[0]
        pending.popleft()
        if on_progress is not None:
            on_progress(next(done), total)
        return result

    errors: list[Exception] = []
    try:
        for image in _until_error(images, errors):
            pending.append(asyncio.create_task(call(image)))
            await asyncio.sleep(0)
            while pending and (pending[0].done() or len(pending) >= 2 * concurrency):
                yield await first()
        while pending:
            yield await first()
        if errors:
            raise errors[0]
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _check(concurrency: int, images: Iterable[Image]) -> int | None:
    if concurrency < 1:
        raise ValueError("concurrency must be at least 1")
    return len(images) if isinstance(images, Sized) else None


def _until_error(images: Iterable[Image], errors: list[Exception]) -> Iterator[Image]:
    """Yield images until the iterable raises; store the exception, because the images before it have results."""
    try:
        # `yield from` would close a generator that the caller may continue.
        for image in images:  # noqa: UP028
            yield image
    except Exception as error:
        errors.append(error)
