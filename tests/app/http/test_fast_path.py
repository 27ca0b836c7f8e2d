"""`POST /score` over real connections: replies of the fast path are equal to those of the general path."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from uvicorn.server import ServerState

from app.http.middleware import RequestMiddleware
from app.http.server import ServerProtocol
from app.inference.detector import Detector, Pictures
from app.main import Application, create_app
from app.settings import Settings
from tests.conftest import MODEL_STORE, lifespan
from tests.waiting import until


class CountingProtocol(ServerProtocol):
    """A connection that counts the bytes it has read."""

    received = 0

    def data_received(self, data: bytes) -> None:
        """Count and parse what has arrived."""
        super().data_received(data)
        self.received += len(data)


@dataclass
class Side:
    """The server's side of all connections."""

    port: int
    app: Application
    state: ServerState
    short: int = 0
    """Number of requests that took the fast path."""
    general: bool = False
    """Whether every request must take the general path."""
    protocols: list[CountingProtocol] = field(default_factory=list)

    async def has_read(self, count: int) -> None:
        """Wait until the newest connection has read so many bytes, or has been closed."""
        await until(lambda: self.protocols and (self.protocols[-1].received >= count or not self.state.connections))

    async def is_idle(self) -> None:
        """Wait until no connection is open and no request is being handled."""
        await until(lambda: not (self.state.connections or self.state.tasks))


@asynccontextmanager
async def serving(settings: Settings, monkeypatch: pytest.MonkeyPatch, **chosen: Any) -> AsyncIterator[Side]:
    """Run an application with real connections; `chosen` is passed to uvicorn."""
    app = create_app(settings)
    config, state = uvicorn.Config(app, lifespan="off", log_config=None, proxy_headers=False, **chosen), ServerState()
    config.load()
    async with lifespan(app):
        side = Side(0, app, state)

        def make() -> ServerProtocol:
            side.protocols.append(CountingProtocol(config, state, {}))
            return side.protocols[-1]

        takes_fast_path = ServerProtocol._takes_fast_path
        monkeypatch.setattr(
            ServerProtocol,
            "_takes_fast_path",
            lambda protocol, headers: not side.general and takes_fast_path(protocol, headers),
        )
        begin = RequestMiddleware.begin

        def counted(self: RequestMiddleware, *given: Any) -> Any:
            begun = begin(self, *given)
            side.short += begun is not None
            return begun

        monkeypatch.setattr(RequestMiddleware, "begin", counted)
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        side.port = server.sockets[0].getsockname()[1]
        yield side
        server.close()
        for protocol in state.connections.copy():
            protocol.transport.abort()
        await server.wait_closed()


@pytest.fixture
async def side(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Side]:
    """Yield an application with the shipped model store and real connections."""
    async with serving(make_settings(model_store=MODEL_STORE), monkeypatch) as side:
        yield side


def request(body: bytes, kind: str = "image/png", query: str = "", **headers: str) -> bytes:
    """Return a request as it goes over the wire; `_` in the names of headers is `-`."""
    lines = [f"POST /score{query} HTTP/1.1", "host: x", f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def form(*files: bytes) -> bytes:
    """Return a form with files."""
    parts = [b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n' % file for file in files]
    return b"".join(parts) + b"--b--\r\n"


@dataclass
class Got:
    """A reply."""

    status: int
    headers: dict[str, str]
    body: bytes


async def read(reader: asyncio.StreamReader) -> Got:
    """Read one reply."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    headers = dict(line.split(": ", 1) for line in head[1:-1])
    assert len(headers) == len(head) - 2
    return Got(int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])))


async def ask(side: Side, *pieces: bytes) -> Got:
    """Send a request piece by piece, each seen by the server before the next one is sent, and read the reply."""
    known, sent = len(side.protocols), 0
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    for piece in pieces:
        if sent:
            await until(lambda: len(side.protocols) > known)
            await side.has_read(sent)
        writer.write(piece)
        sent += len(piece)
    async with asyncio.timeout(30):
        got = await read(reader)
    writer.close()
    return got


def comparable(got: Got) -> tuple[int, dict[str, str], Any]:
    """Return the parts of a response that are equal for equal requests."""
    document = json.loads(got.body)
    for name in ("id", "reconstruction", "instance"):
        if name in document:
            document[name] = bool(document[name])
    headers = {name: value for name, value in got.headers.items() if name not in ("server-timing", "x-request-id")}
    assert ("server-timing" in got.headers) == (got.status == 200)
    assert got.headers["x-request-id"]
    return got.status, headers, document


FORM = "multipart/form-data; boundary=b"
ALIKE: dict[str, tuple[Callable[[bytes], bytes], int, bool]] = {
    "raw": (request, 200, True),
    "form": (lambda png: request(form(png), FORM), 200, True),
    "model": (lambda png: request(png, query="?model=zero"), 200, True),
    "version": (lambda png: request(png, query="?model=zero@1&alpha=0.05"), 200, True),
    "embedded": (lambda png: request(png, query="?include=reconstruction"), 200, True),
    "fitted": (lambda _: request(_digit(), query="?fit=mnist"), 200, False),
    "form that is parsed": (lambda png: request(form(png).replace(b'"a"', b'"a"; x=y'), FORM + "; c=d"), 200, False),
    "no PNG": (lambda _: request(b"no PNG"), 422, True),
    "empty form": (lambda _: request(form(b""), FORM), 400, False),
    "two files": (lambda png: request(form(png, png), FORM), 400, False),
    "other type": (lambda png: request(png, "text/plain"), 415, True),
    "unknown parameter": (lambda png: request(png, query="?x=1"), 422, True),
    "parameter twice": (lambda png: request(png, query="?alpha=0.1&alpha=0.2"), 422, True),
    "small alpha": (lambda png: request(png, query="?alpha=0.0000001"), 422, True),
    "fragment": (lambda png: request(png, query="?model=zero#x"), 200, False),
    "no model": (lambda png: request(png, query="?model=none"), 404, False),
    "no version": (lambda png: request(png, query="?model=zero@99"), 404, False),
    "too large": (lambda _: request(b"x" * 70_000), 413, False),
}


def _digit() -> bytes:
    file = io.BytesIO()
    picture = np.full((90, 90), 255, np.uint8)
    picture[20:70, 40:50] = 0
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


async def test_both_paths_and_every_split_give_the_same_answer(side: Side, zero: bytes) -> None:
    """Status, headers and document depend neither on the path nor on how a request is split into packets."""
    for name, (make, status, short) in ALIKE.items():
        asked, before = make(zero), side.short
        cut = asked.index(b"\r\n\r\n") + 4
        side.general = True
        general = await ask(side, asked[:cut], asked[cut:])
        side.general = False
        assert side.short == before, name
        whole = await ask(side, asked)
        assert side.short - before == short, name
        split = await ask(side, asked[:cut], asked[cut:])
        assert side.short - before == 2 * short, name
        assert whole.status == status, name
        assert comparable(whole) == comparable(split) == comparable(general), name


async def test_a_body_that_pauses_takes_the_general_path(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, zero: bytes
) -> None:
    """A slow body is moved to the general path; it is scored if it is complete before the body timeout, else 408."""
    monkeypatch.setattr("app.http.server._PENDING_SECONDS", 0.05)
    async with serving(make_settings(body_timeout_ms=1000), monkeypatch) as side:
        asked = request(zero)
        for rest, status in ((asked[-50:], 200), (b"", 408)):
            reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
            writer.write(asked[:-50])
            async with asyncio.timeout(30):
                await until(lambda: side.state.tasks)
                writer.write(rest)
                assert (await read(reader)).status == status
            writer.close()
        assert side.short == 0


async def test_a_disconnect_cancels_the_score(side: Side, zero: bytes) -> None:
    """If a client disconnects before its micro-batch begins, its image is neither scored nor stored, on both paths."""
    registry = side.app.services.registry
    version = registry.current(registry.default_model)
    assert version is not None
    gate, begun = threading.Event(), threading.Event()

    class Blocking:
        def __init__(self, detector: Detector) -> None:
            self._detector = detector

        def draw(self, images: Any) -> Pictures:
            begun.set()
            gate.wait(30)
            return self._detector.draw(images)

    version.detector = Blocking(version.detector)  # type: ignore[assignment]

    async def count(name: str) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        text = (await read(reader)).body.decode()
        writer.close()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    for side.general in (False, True):
        begun.clear()
        gate.clear()
        probe = asyncio.create_task(version.probe())  # a forward pass without a request
        await until(begun.is_set)
        scored, left = await count("anomaly_scores_total"), await count('anomaly_http_requests_total{route="/score",st')
        clients = [await asyncio.open_connection("127.0.0.1", side.port) for _ in range(20)]
        for _, writer in clients:
            writer.write(request(zero))
        async with asyncio.timeout(30):
            await until(lambda: version.queue.waiting == 20)
            for _, writer in clients:
                writer.transport.abort()
            await side.is_idle()
        gate.set()
        await asyncio.gather(probe, *[version.probe() for _ in range(2)])
        assert await count("anomaly_scores_total") == scored
        assert await count('anomaly_http_requests_total{route="/score",st') == left + 20


async def test_any_asgi_wrapper_may_stand_in_front(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, zero: bytes
) -> None:
    """Behind uvicorn's own ProxyHeadersMiddleware a complete request is scored, by the general path."""
    app = create_app(make_settings())
    config, state = uvicorn.Config(app, lifespan="off", log_config=None, proxy_headers=True), ServerState()
    config.load()
    async with lifespan(app):
        server = await asyncio.get_running_loop().create_server(
            lambda: ServerProtocol(config, state, {}), "127.0.0.1", 0
        )
        side = Side(server.sockets[0].getsockname()[1], app, state)
        assert (await ask(side, request(zero))).status == 200
        server.close()
        await server.wait_closed()


async def test_a_failure_in_the_fast_path_falls_back(
    side: Side, zero: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the middleware's fast path raises, the general path answers, and the log names the cause."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(RequestMiddleware, "begin", broken)
    assert (await ask(side, request(zero))).status == 200
    (line,) = caplog.records
    assert line.exc_info is not None
    assert line.exc_info[0] is ZeroDivisionError


async def test_chunked_bodies_take_the_general_path(side: Side, zero: bytes) -> None:
    """A body without a length is scored too."""
    head = b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (10, zero[:10], len(zero) - 10, zero[10:])
    assert (await ask(side, head + body)).status == 200
    assert side.short == 0


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
async def test_a_request_for_another_protocol_is_scored(side: Side, zero: bytes, protocol: str) -> None:
    """The upgrade request of Java's client and `curl --http2` is handled like any other, complete or in pieces."""
    asked = request(zero, connection="Upgrade, HTTP2-Settings", upgrade=protocol, http2_settings="AAMAAABk")
    for pieces in ([asked], [asked[:-50], asked[-50:]]):
        assert (await ask(side, *pieces)).status == 200
    assert side.short == 2


@pytest.mark.parametrize("path", ["/score", "/score/batch"])
async def test_what_comes_behind_a_body_is_no_header(side: Side, zero: bytes, path: str) -> None:
    """Trailers of a chunked body have no effect, in any number of packets, because they were not checked as headers."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    body = form(zero).replace(b'"file"', b'"files"') if path == "/score/batch" else form(zero)
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    trailers = b"x-request-id: behind\r\naccept: application/x-ndjson\r\ncontent-type: text/plain\r\n\r\n"
    for pieces in ([head + chunks + trailers], [head, chunks + trailers]):
        got = await ask(side, *pieces)
        assert (got.status, got.headers["content-type"]) == (200, "application/json")
        assert got.headers["x-request-id"] != "behind"
    assert side.short == 0


@pytest.mark.parametrize("length", [3000, 70_000])
async def test_urls_that_are_too_long_are_refused(
    side: Side, zero: bytes, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An invalid URL gets 400 for any split into packets, and is not a server error."""
    asked = request(zero, query="?" + "a" * length)
    cut = asked.index(b"\r\n\r\n") + 4
    for pieces in ([asked], [asked[:cut], asked[cut:]]):
        known, sent = len(side.protocols), 0
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port, limit=2**20)
        async with asyncio.timeout(30):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
                await until(lambda known=known: len(side.protocols) > known)
                await side.has_read(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        writer.close()
        assert head.startswith(b"http/1.1 400 ")
        assert b"application/problem+json" in head
    assert side.short == 0
    assert {line.levelname for line in caplog.records} <= {"WARNING"}


async def test_what_comes_with_a_refused_request_has_its_time(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, zero: bytes
) -> None:
    """The idle timeout does not run while the client sends a request that began in the packet of a rejected one."""
    async with serving(make_settings(body_timeout_ms=1500), monkeypatch, timeout_keep_alive=1) as side:
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        writer.write(request(b"no PNG", "text/plain") + request(zero)[:-5])
        async with asyncio.timeout(30):
            assert [(await read(reader)).status for _ in range(2)] == [415, 408]
        writer.close()
        assert side.short == 1


async def test_refused_requests_take_turns_with_others(side: Side) -> None:
    """Of many requests in one packet, one is served per event-loop iteration, so that other clients do not wait."""
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    writer.write(request(b"no PNG", "text/plain") * 50)
    turns, metrics = 0, side.app.services.metrics
    async with asyncio.timeout(30):
        while b'anomaly_http_requests_total{route="/score",status="415"} 50.0' not in metrics.exposition():
            await asyncio.sleep(0)
            turns += 1
        assert [(await read(reader)).status for _ in range(50)] == [415] * 50
    writer.close()
    assert turns >= 50


async def test_connections_are_let_go_of_at_once(side: Side, zero: bytes) -> None:
    """A closed connection leaves no reference cycles, which only the garbage collector would free, much later."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert (await ask(side, request(zero))).status == 200
        gone = [weakref.ref(protocol) for protocol in side.protocols]
        side.protocols.clear()
        async with asyncio.timeout(30):
            await until(lambda: not side.state.connections and not any(each() for each in gone))
    finally:
        gc.enable()
    assert len(gone) == side.short == 3


async def test_an_empty_body_is_rejected(side: Side) -> None:
    """A request without a body is rejected, also if its head arrives in two pieces."""
    asked = request(b"")
    for pieces in ([asked], [asked[:30], asked[30:]]):
        got = await ask(side, *pieces)
        assert (got.status, json.loads(got.body)["type"]) == (400, "/problems/empty-body")
    assert side.short == 0


async def test_requests_that_come_together_are_answered_in_order(side: Side, zero: bytes, six: bytes) -> None:
    """Of several requests in one packet, the first takes the fast path, and each request gets its own reply."""
    asked = [request(png, x_request_id=f"r{place}") for place, png in enumerate([zero, six, b"no PNG", zero])]
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    writer.write(b"".join(asked) + b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(30):
        got = [await read(reader) for _ in range(5)]
    writer.close()
    assert [each.headers["x-request-id"] for each in got[:4]] == ["r0", "r1", "r2", "r3"]
    assert [each.status for each in got] == [200, 200, 422, 200, 200]
    assert json.loads(got[0].body)["mse"] == json.loads(got[3].body)["mse"] != json.loads(got[1].body)["mse"]
    assert side.short == 1


async def test_a_connection_goes_on(side: Side, zero: bytes) -> None:
    """One connection serves sequential requests: complete ones, ones in pieces, and ones of other routes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    async with asyncio.timeout(30):
        sent = 0
        for place in range(9):
            asked = [request(zero), b"GET /models HTTP/1.1\r\nhost: x\r\n\r\n", request(zero)][place % 3]
            for piece in [asked[:-50], asked[-50:]] if place % 3 == 2 else [asked]:
                writer.write(piece)
                sent += len(piece)
                await side.has_read(sent)
            assert (await read(reader)).status == 200
    writer.close()
    assert side.short == 6


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_wants_the_connection_closed_has_it_closed(side: Side, zero: bytes, version: str) -> None:
    """The reply says so, and nothing comes after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    writer.write(request(zero, connection="close").replace(b"HTTP/1.1", b"HTTP/" + version.encode()))
    async with asyncio.timeout(30):
        got = await read(reader)
        assert await reader.read() == b""
    writer.close()
    assert (got.status, got.headers["connection"]) == (200, "close")
    assert side.short == (version == "1.1")


@pytest.mark.parametrize("count", [0, 300])
async def test_a_client_of_http_1_0_gets_no_chunks(side: Side, count: int) -> None:
    """A client of HTTP/1.0 gets the same NDJSON lines with a Content-Length, and the connection is then closed."""
    array = io.BytesIO()
    np.save(array, np.zeros((count, 28, 28), np.uint8))
    asked = request(array.getvalue(), "application/x-npy", accept="application/x-ndjson").replace(
        b"/score", b"/score/batch"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    writer.write(asked.replace(b"HTTP/1.1", b"HTTP/1.0"))
    async with asyncio.timeout(30):
        got = await read(reader)
        assert await reader.read() == b""
    writer.close()
    assert (got.status, got.headers["content-type"]) == (200, "application/x-ndjson")
    assert [json.loads(line)["index"] for line in got.body.splitlines()] == list(range(count))


async def test_a_stop_answers_what_was_begun(side: Side, zero: bytes) -> None:
    """A server that gets a stop signal during a score sends the score, and closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    writer.write(request(zero))
    async with asyncio.timeout(30):
        while not side.short:
            await asyncio.sleep(0)
        side.protocols[0].shutdown()
        got = await read(reader)
        assert await reader.read() == b""
    writer.close()
    assert (got.status, got.headers["connection"]) == (200, "close")


async def test_a_client_that_leaves_harms_nobody(side: Side, zero: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """If a client disconnects before its reply, its connection is closed without an error, and others are served."""
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", side.port)
            writer.write(request(zero))
            await writer.drain()
            writer.transport.abort()
        async with asyncio.timeout(30):
            assert (await ask(side, request(zero))).status == 200
            await until(lambda: not side.state.connections)
    assert side.short == 6
    assert caplog.records == []


async def test_a_client_that_is_behind_waits(side: Side, zero: bytes) -> None:
    """While a client does not read its replies, its next request is not begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    writer.write(request(zero))
    async with asyncio.timeout(30):
        assert (await read(reader)).status == 200
        (protocol,) = side.protocols
        protocol.pause_writing()
        writer.write(request(zero))
        while not side.state.tasks:
            await asyncio.sleep(0)
        protocol.resume_writing()
        assert (await read(reader)).status == 200
    writer.close()
    assert side.short == 1


async def test_a_failure_is_answered(
    side: Side, zero: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error on the fast path causes an `internal-error` problem and a log line."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("app.scoring.verdict.DecisionRule.for_alpha", broken)
    whole = await ask(side, request(zero, x_request_id="mine"))
    assert (whole.status, json.loads(whole.body)["type"]) == (500, "/problems/internal-error")
    assert json.loads(whole.body)["instance"] == "urn:request:mine"
    assert side.short == 1
    assert [(line.message, line.request_id) for line in caplog.records] == [("request failed", "mine")]  # type: ignore[attr-defined]


async def test_metrics_and_log_do_not_tell_them_apart(
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    zero: bytes,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    """Both paths have the same metrics and the same log line."""
    async with serving(make_settings(log_requests=True), monkeypatch) as side:
        for png in (zero, b"no PNG"):
            asked = request(png, x_request_id="whole")
            await ask(side, asked)
            side.general = True
            await ask(side, request(png, x_request_id="pieces"))
            side.general = False
        assert side.short == 2
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        metrics = (await read(reader)).body.decode().splitlines()
        writer.close()
    for status in (200, 422):
        assert f'anomaly_http_requests_total{{route="/score",status="{status}"}} 2.0' in metrics
    assert 'anomaly_http_request_duration_seconds_count{route="/score"} 4.0' in metrics
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    by_name = {name: [line for line in lines if line["request_id"] == name] for name in ("whole", "pieces")}
    for whole, in_pieces in zip(by_name["whole"], by_name["pieces"], strict=True):
        assert list(whole) == list(in_pieces)
        same = ("method", "route", "status", "model", "version", "mse", "is_anomaly", "problem")
        assert [whole.get(name) for name in same] == [in_pieces.get(name) for name in same]


async def test_keys_are_asked_for(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, zero: bytes, tmp_path: Path
) -> None:
    """A request on the fast path also needs an API key, and its name is recorded."""
    (tmp_path / "keys").write_text(f"{hashlib.sha256(b'secret').hexdigest()} line-1\n")
    async with serving(make_settings(api_keys_file=tmp_path / "keys"), monkeypatch) as side:
        refused = await ask(side, request(zero))
        assert (refused.status, refused.headers["connection"], side.short) == (401, "close", 0)
        scored = await ask(side, request(zero, x_api_key="secret"))
        assert (scored.status, side.short) == (200, 1)
        path = json.loads(scored.body)["reconstruction"]
        got = {}
        for key in ("secret", "other"):
            reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\n\r\n".encode())
            got[key] = (await read(reader)).status
            writer.close()
    assert got == {"secret": 200, "other": 401}
