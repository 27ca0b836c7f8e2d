"""The clients against servers that misbehave, without the service."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import get_origin, get_type_hints

import httpx
import pytest

from anomaly import NO_RETRY, AsyncClient, Client, Retry, Score, TimedOut, UnexpectedReply
from anomaly.client import errors, wire
from tests.waiting import until

GOOD = (
    b'{"id": null, "model": "zero", "version": 1, "mse": 0.1, "threshold": 0.2, "alpha": 0.01, "p_value": 0.5,'
    b' "is_anomaly": false, "reason": null}'
)


def answering(service: Client | AsyncClient, answer: Callable[[httpx.Request], httpx.Response]) -> list[httpx.Request]:
    """Have a client's requests answered without a server. Returns the requests, as they come."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answer(request)

    service._http._transport = httpx.MockTransport(handle)  # type: ignore[union-attr]
    return asked


def good(_: httpx.Request) -> httpx.Response:
    """Answer with a score."""
    return httpx.Response(200, content=GOOD)


@pytest.fixture
def service() -> Iterator[Client]:
    """Yield a client that asks once."""
    with Client("http://127.0.0.1:1", retry=NO_RETRY) as client:
        yield client


class Slow:
    """A server that replies to no request before the test allows it."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked = 0
        self.serving: set[asyncio.Task[None] | None] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reply to the requests of one connection."""
        self.serving.add(asyncio.current_task())
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(3)
                self.asked += 1
                await self.go.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(GOOD), GOOD))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def slow() -> AsyncIterator[tuple[Slow, str]]:
    """Run such a server."""
    server = Slow()
    listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    async with listening:
        yield server, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        server.go.set()
        await asyncio.gather(*(task for task in server.serving if task is not None))


async def cancelled_after(turns: int, call: Callable[[], asyncio.Task[Score]]) -> None:
    """Make a call, and cancel it after so many turns of the event loop."""
    task = call()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_cancelled_call_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of cancellations at any point, the next call gets a connection."""
    monkeypatch.setattr(wire, "CONNECTIONS", 4)
    async with slow() as (server, url), AsyncClient(url, retry=NO_RETRY) as service:
        server.go.set()
        for turns in range(6, 36):
            await asyncio.gather(
                *(cancelled_after(turns, lambda: asyncio.create_task(service.score(b"png"))) for _ in range(4))
            )
        assert isinstance(await asyncio.wait_for(service.score(b"png"), 20), Score)


async def test_who_was_cancelled_while_waiting_for_a_connection_is_not_sent() -> None:
    """Requests of cancelled callers are not sent unless they have begun; closing the client ends those too."""
    async with slow() as (server, url), AsyncClient(url, retry=NO_RETRY) as service:
        calls = [asyncio.create_task(service.score(b"png")) for _ in range(100)]
        await until(lambda: server.asked == 64)
        for call in calls:
            call.cancel()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ends} == {asyncio.CancelledError}
        await service.aclose()
        assert asyncio.all_tasks() - server.serving == {asyncio.current_task()}
    assert server.asked == 64


class Camera:
    """A source of images, one every `pause` seconds, that fails after the first result was read."""

    def __init__(self, pause: float) -> None:
        self.taken = 0
        self.seen: list[object] = []
        self._pause = pause

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(1000):
            self.taken += 1
            yield b"png"
            time.sleep(self._pause)  # this test needs a source that is slower than the service
            if self.seen:
                raise OSError("the camera is gone")


def test_results_come_while_images_do(service: Client) -> None:
    """A result is yielded without waiting for further images, and no result is lost if the source fails."""
    answering(service, good)
    camera = Camera(0.005)
    with pytest.raises(OSError, match="camera"):
        for result in service.score_many(camera, concurrency=500):
            camera.seen.append(result)
    assert len(camera.seen) == camera.taken < 1000


async def test_results_come_while_images_do_in_async_code() -> None:
    """Requests progress between two images, and no result is lost if the source fails."""
    camera = Camera(0)
    async with AsyncClient("http://127.0.0.1:1") as service:
        answering(service, good)
        with pytest.raises(OSError, match="camera"):
            async for result in service.score_many(camera, concurrency=500):
                camera.seen.append(result)
    assert len(camera.seen) == camera.taken < 1000


def test_after_what_befalls_every_image_no_other_is_asked(service: Client) -> None:
    """After a timeout, the run ends: no thread reads another image."""
    both = threading.Barrier(2)

    def silent(_: httpx.Request) -> httpx.Response:
        both.wait(10)
        raise httpx.ReadTimeout("")

    asked = answering(service, silent)
    results = service.score_many([b"png"] * 4, concurrency=2)
    with pytest.raises(TimedOut):
        next(results)
    assert len(asked) == 2


@pytest.mark.parametrize("interrupted", [True, False], ids=["while it takes an image", "while its reader has a result"])
def test_ctrl_c_does_not_wait_for_a_silent_service(service: Client, interrupted: bool) -> None:
    """A run that is interrupted or closed ends without waiting for its replies."""
    told, go, late = threading.Event(), threading.Event(), threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.content == b"silent":
            told.set()
            go.wait(20)
            late.set()
        told.wait(60)
        return good(request)

    def images() -> Iterator[bytes]:
        yield from (b"png", b"silent")
        if interrupted:
            told.wait(60)
            raise KeyboardInterrupt

    answering(service, answer)
    results = service.score_many(images(), concurrency=2)
    try:
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                list(results)
        else:
            next(results)
            results.close()
        assert not late.is_set()
    finally:
        go.set()


@pytest.mark.parametrize(
    "body",
    [
        GOOD.replace(b'"version": 1', b'"version": Infinity'),
        b"[" * 100_000,
        GOOD.replace(b"false", b'"false"'),
        GOOD.replace(b'"id": null', b'"id": 5'),
        GOOD.replace(b'"reason": null', b'"reason": {}'),
    ],
    ids=["infinite", "deep", "truth", "id", "reason"],
)
def test_a_reply_of_the_wrong_kind_is_unexpected(service: Client, body: bytes) -> None:
    """For any reply, the client returns a score or raises `ServiceError`."""
    answering(service, lambda _: httpx.Response(200, content=body))
    with pytest.raises(UnexpectedReply):
        service.score(b"png")
    problem = {"content-type": "application/problem+json"}
    answering(service, lambda _: httpx.Response(500, content=body, headers=problem))
    with pytest.raises(errors.InternalError):
        service.score(b"png")


def test_a_problem_is_known_by_any_spelling_of_its_type(service: Client) -> None:
    """Media types are compared without case, and a null member becomes an empty text."""
    document = {"type": "/problems/model-not-found", "title": None, "detail": None, "hint": None}
    header = {"content-type": "Application/Problem+JSON; charset=utf-8"}
    answering(service, lambda _: httpx.Response(404, json=document, headers=header))
    with pytest.raises(errors.ModelNotFound) as caught:
        service.score(b"png")
    assert (str(caught.value), caught.value.detail, caught.value.hint) == ("HTTP 404", "", "")


def test_a_name_that_no_file_can_have_is_one_image(service: Client) -> None:
    """A path with a NUL is the result of that image, and the others are scored."""
    answering(service, good)
    results = list(service.score_many([b"png", Path("a\0.png"), b"png"]))
    assert [type(result) for result in results] == [Score, errors.UnreadableImage, Score]
    assert "null byte" in str(results[1])


def test_what_is_encrypted_is_verified() -> None:
    """With https, a client trusts the public authorities; with http, none. It always verifies certificates."""
    authorities = wire.options("https://host", None, 1.0)["verify"]
    assert authorities.verify_mode == ssl.CERT_REQUIRED
    assert authorities.check_hostname
    assert len(authorities.get_ca_certs()) > 50
    nobody = wire.options("http://host", None, 1.0)["verify"]
    assert nobody.verify_mode == ssl.CERT_REQUIRED
    assert nobody.check_hostname
    assert nobody.get_ca_certs() == []


def test_many_scores_can_be_closed() -> None:
    """The types say that the results are generators, so that `close` and `aclose` pass a type checker."""
    assert get_origin(get_type_hints(Client.score_many)["return"]) is Generator
    assert get_origin(get_type_hints(AsyncClient.score_many)["return"]) is AsyncGenerator


def test_the_rest_of_a_generator_is_its_owner_s(service: Client) -> None:
    """A caller that closes the results early can continue with the remaining images of its generator."""
    answering(service, good)
    images = (b"%d" % number for number in range(100))
    results = service.score_many(images, concurrency=1)
    next(results)
    results.close()
    assert len(list(images)) >= 97


def test_a_later_image_s_error_takes_nothing_from_an_earlier_one() -> None:
    """An image that is retried gets its result, although a later image has already ended the run with an error."""
    ended = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.content == b"second":
            ended.set()
            return httpx.Response(401, json={"type": "/problems/unauthorized", "title": "no"})
        if ended.is_set():
            return good(request)
        return httpx.Response(503, json={"type": "/problems/overloaded", "title": "busy"})

    with Client("http://127.0.0.1:1", retry=Retry(patience=30)) as service:
        answering(service, answer)
        results = service.score_many([b"first", b"second"])
        assert isinstance(next(results), Score)
        with pytest.raises(errors.Unauthorized):
            next(results)
