"""The server's side of a connection: coalesced writes, clients that do not read, bytes that are not HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.http import connection, server
from tests.waiting import until


async def large(scope: Any, receive: Any, send: Any) -> None:
    """Answer every request with a reply that is larger than all buffers."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(400):
        await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("reads", [False, True])
async def test_only_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """The connection of a client that reads nothing ends after a timeout; that of a slow reader does not."""
    monkeypatch.setattr(connection, "STALLED_SECONDS", 1.5)
    for _ in range(10):
        size, longest = await _taken(reads)
        if longest < 0.5:
            break  # after a longer pause of this process, its client may count as one that does not read
    assert (size > 400 * 65536) == reads


async def _taken(reads: bool) -> tuple[int, float]:
    """Return the number of received bytes of a large reply until the connection ended, and the longest pause."""
    config, state = uvicorn.Config(large, lifespan="off", log_config=None), ServerState()
    config.load()
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: server.ServerProtocol(config, state, {}), "127.0.0.1", 0)
    size, longest = 0, 0.0
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, listener.sockets[0].getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(60):
            await until(lambda: state.tasks)
            before = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                while reads and (content := await loop.sock_recv(client, 65536)):
                    size += len(content)
                    await asyncio.sleep(0.006)  # a slow reader: the timeout is for the time between two reads
                    longest, before = max(longest, time.monotonic() - before), time.monotonic()
            await until(lambda: not (state.connections or state.tasks))
    listener.close()
    await listener.wait_closed()
    return size, longest


class Wire:
    """A transport that records writes and the time of its close."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        """Remember."""
        self.writes.append(data)
        assert not self.closed

    def close(self) -> None:
        """Remember."""
        self.closed = True

    def get_write_buffer_size(self) -> int:
        """Return an empty write buffer."""
        return 0

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return self.closed


async def test_what_is_written_in_one_turn_is_sent_at_once():
    """Head and body of a reply are one write; a reply in the next event-loop iteration is another."""
    wire = Wire()
    joined = connection.CoalescingTransport(wire, asyncio.get_running_loop())
    joined.write(b"head ")
    joined.write(b"body")
    assert wire.writes == []
    await asyncio.sleep(0)
    joined.write(b"more")
    await asyncio.sleep(0)
    assert wire.writes == [b"head body", b"more"]


async def test_closing_sends_first():
    """`close` sends everything that was written."""
    wire = Wire()
    joined = connection.CoalescingTransport(wire, asyncio.get_running_loop())
    joined.write(b"last words")
    joined.close()
    assert (wire.writes, wire.closed) == ([b"last words"], True)
    await asyncio.sleep(0)
    assert wire.writes == [b"last words"]


async def test_what_a_client_that_left_was_to_get_is_dropped():
    """The server does not write to a transport that was closed before the write, because uvloop then raises."""
    wire = Wire()
    joined = connection.CoalescingTransport(wire, asyncio.get_running_loop())
    joined.write(b"too late")
    wire.close()
    await asyncio.sleep(0)
    assert wire.writes == []


async def test_much_is_not_held_back():
    """A long reply is sent before the end of the event-loop iteration."""
    wire = Wire()
    joined = connection.CoalescingTransport(wire, asyncio.get_running_loop())
    for _ in range(5):
        joined.write(bytes(30_000))
    assert sum(map(len, wire.writes)) >= 90_000
    await asyncio.sleep(0)
    assert sum(map(len, wire.writes)) == 150_000


@asynccontextmanager
async def connected(app: Any, **chosen: Any) -> AsyncIterator[tuple[server.ServerProtocol, asyncio.StreamReader]]:
    """Yield the server's protocol object, which gets the client's bytes, and a reader of the replies."""
    config, state = uvicorn.Config(app, lifespan="off", log_config=None, **chosen), ServerState()
    config.load()
    side = server.ServerProtocol(config, state, {})
    listener = await asyncio.get_running_loop().create_server(lambda: side, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    async with asyncio.timeout(60):
        while not state.connections:
            await asyncio.sleep(0)
        try:
            yield side, reader
        finally:
            writer.transport.abort()
            listener.close()
            await listener.wait_closed()
            while state.connections or state.tasks:
                await asyncio.sleep(0)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Reply with the method, the path and the body of the request."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    said = f"{scope['method']} {scope['path']} {body!r}\n".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
    await send({"type": "http.response.body", "body": said})


ASKED_NOTHING = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def said(reader: asyncio.StreamReader) -> str:
    """Return the body of the next reply of `echo`."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return (await reader.readline()).decode().rstrip()


HIDDEN = b"GET /hidden HTTP/1.1\r\n\r\n"
ASKS_FOR_MORE = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    "websocket": b"Connection: upgrade\r\nUpgrade: websocket\r\n",
}
FRAMED = {
    "length": b"Content-Length: %d\r\n\r\n%b" % (len(HIDDEN), HIDDEN),
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n5\r\n%b\r\n%x\r\n%b\r\n0\r\nA: b\r\n\r\n"
    % (HIDDEN[:5], len(HIDDEN) - 5, HIDDEN[5:]),
}


@pytest.mark.parametrize("asks", ASKS_FOR_MORE)
@pytest.mark.parametrize("framed", FRAMED)
async def test_a_request_for_another_protocol_keeps_its_body(asks: str, framed: str) -> None:
    """For any packet boundaries, the body never counts as the next request, and later requests are served."""
    head = b"POST /first HTTP/1.1\r\nHost: x\r\n" + ASKS_FOR_MORE[asks]
    asked = head + FRAMED[framed] + b"GET /second HTTP/1.1\r\nHost: x\r\n" + ASKS_FOR_MORE[asks] + b"\r\n"
    async with connected(echo) as (side, reader):
        for cut in range(1, len(asked)):
            for piece in (asked[:cut], asked[cut:]):
                side.data_received(piece)
            assert await said(reader) == f"POST /first {HIDDEN!r}"
            assert await said(reader) == "GET /second b''"


async def test_what_follows_a_connect_is_no_request() -> None:
    """A CONNECT request is rejected and the connection closed, because the bytes after it are not a request."""
    async with connected(echo) as (side, reader):
        side.data_received(b"CONNECT /x HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN)
        assert (await reader.read()).count(b"HTTP/1.1 400 ") == 1


GARBAGE = b"\0GARBAGE\r\n\r\n"
ASKED = b"POST /first HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
BAD_CHUNK = b"POST /bad HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"


@pytest.mark.parametrize("bad", [GARBAGE, BAD_CHUNK])
async def test_what_is_no_http_waits_for_its_turn(bad: bytes) -> None:
    """The earlier requests are served in order; then the invalid bytes get 400, and nothing follows."""
    async with connected(echo) as (side, reader):
        side.data_received(ASKED + ASKED + bad)
        side.data_received(ASKED)
        for _ in range(2):
            assert await said(reader) == "POST /first b'abc'"
        refusal = await reader.read()
    assert refusal.startswith(b"HTTP/1.1 400 ")
    assert b"/problems/malformed-request" in refusal
    assert refusal.count(b"HTTP/1.1") == 1


async def test_what_is_no_http_is_refused_at_once_where_nothing_runs() -> None:
    """A malformed body gets a 400 for its request, and so do invalid bytes after all replies."""
    async with connected(echo) as (side, reader):
        side.data_received(BAD_CHUNK[:-6])
        await asyncio.sleep(0)
        side.data_received(BAD_CHUNK[-6:])
        assert (await reader.read()).count(b"HTTP/1.1 400 ") == 1
    async with connected(echo) as (side, reader):
        side.data_received(ASKED)
        assert await said(reader) == "POST /first b'abc'"
        side.data_received(GARBAGE)
        assert (await reader.read()).count(b"HTTP/1.1 400 ") == 1


async def test_a_reply_that_was_begun_is_not_broken_into() -> None:
    """Bytes that are not HTTP cause no output inside a reply: after a request they wait; in a body they end it."""
    goes_on = asyncio.Event()

    async def streams(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await goes_on.wait()
        await send({"type": "http.response.body", "body": b"two"})

    async with connected(streams) as (side, reader):
        side.data_received(ASKED)
        assert (await reader.readuntil(b"one\r\n")).startswith(b"HTTP/1.1 200 ")
        side.data_received(GARBAGE)
        goes_on.set()
        assert (await reader.read()).startswith(b"3\r\ntwo\r\n0\r\n\r\nHTTP/1.1 400 ")
    goes_on.clear()
    async with connected(streams) as (side, reader):
        side.data_received(BAD_CHUNK[:-6])
        await reader.readuntil(b"one\r\n")
        side.data_received(BAD_CHUNK[-6:])
        assert await reader.read() == b""
        goes_on.set()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_only_http_1_1_is_told_to_go_on(version: str) -> None:
    """`Expect: 100-continue` is ignored in HTTP/1.0, whose clients would read an interim reply as the reply."""
    async with connected(echo) as (side, reader):
        asked = ASKED.replace(b"1.1", version.encode()).replace(b"Host", b"Expect: 100-continue\r\nHost")
        side.data_received(asked)
        if version == "1.1":
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert await said(reader) == "POST /first b'abc'"


TRAILERS = ASKED.replace(b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n")
ENDLESS = {
    "URL": (b"GET /", b"a" * 1000),
    "header": (b"GET / HTTP/1.1\r\nA: ", b"a" * 1000),
    "headers": (b"GET / HTTP/1.1\r\n", b"a:b\r\n" * 200),
    "trailer": (TRAILERS + b"A: ", b"a" * 1000),
    "trailers": (TRAILERS, b"a:b\r\n" * 200),
    "lines": (b"", b"\r\n" * 500),
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("times", [1, 1000])
async def test_what_has_no_end_is_refused(name: str, times: int) -> None:
    """Head and trailers are read up to their bound, in small pieces or large ones, then the connection is closed."""
    begins, goes_on = ENDLESS[name]
    given = 0
    async with connected(echo) as (side, reader):
        side.data_received(begins)
        while not side.transport.is_closing():
            side.data_received(goes_on * times)
            given += 1
            assert given * times <= 1000
        refusal = await reader.read()
    assert refusal.startswith(b"HTTP/1.1 400 ")
    assert b"more than 65536 bytes" in refusal
    assert times > 1 or given <= 2 * 64 + 2


async def test_what_has_an_end_is_read() -> None:
    """A head of nearly 64 KiB is read, whole and in pieces, and a body may be cut into any number of chunks."""
    head = b"GET /long HTTP/1.1\r\nHost: x\r\nA: %b\r\n\r\n" % (b"a" * 65000)
    chunks = TRAILERS.replace(b"abc\r\n", b"abc\r\n" + b"1;a=b\r\nx\r\n" * 20_000) + b"\r\n"
    async with connected(echo) as (side, reader):
        for size in (1000, len(head)):
            for start in range(0, len(head), size):
                side.data_received(head[start : start + size])
            assert await said(reader) == "GET /long b''"
        side.data_received(chunks + head)
        assert (await said(reader)).count("x") == 20_000
        assert await said(reader) == "GET /long b''"


async def test_nobody_fills_the_memory_with_requests() -> None:
    """Pipelined requests are read one by one; if too many arrive at once, only the first ones are served."""
    livez = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    waits = asyncio.Event()

    async def later(scope: Any, receive: Any, send: Any) -> None:
        await waits.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": b"\n"})

    async with connected(later) as (side, reader):
        side.data_received(livez * 20)
        assert not side.transport.is_reading()
        waits.set()
        for _ in range(10):
            await said(reader)
            assert side.transport.is_reading() == (not side.pipeline)
        waits.clear()
        side.data_received(livez * 10_000)
        assert len(side.pipeline) <= server._MAX_PIPELINED
        waits.set()
        replies = await reader.read()
    assert replies.count(b"HTTP/1.1 200 ") <= server._MAX_PIPELINED + 11
    assert replies.count(b"HTTP/1.1 400 ") == 1
    assert replies.endswith(b"}")


@pytest.mark.parametrize("waiting", [0, 1, 5])
async def test_a_client_that_leaves_ends_the_running_request(waiting: int) -> None:
    """The application is told that the client has left, also if further requests of the connection wait."""
    heard: list[tuple[str, str]] = []

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        heard.append((scope["path"], (await receive())["type"]))
        heard.append((scope["path"], (await receive())["type"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with connected(listening) as (side, _):
        side.data_received(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n" + ASKED_NOTHING * waiting)
        await until(lambda: heard)
        assert len(side.pipeline) == waiting
        side.transport.abort()
        await until(lambda: len(heard) == 2)
    assert heard == [("/first", "http.request"), ("/first", "http.disconnect")]


async def hasty(scope: Any, receive: Any, send: Any) -> None:
    """Answer without reading the body."""
    await send({"type": "http.response.start", "status": 415, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET / HT", ASKED[:-1], ASKED + b"GET / HT"])
async def test_a_client_that_does_not_go_on_is_let_go_of(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    """If a client sends nothing, the connection ends: before or in a head, after a reply, or in a rejected body."""
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.4)
    async with connected(hasty, timeout_keep_alive=0.2) as (side, reader):
        for place in range(len(begun)):
            side.data_received(begun[place : place + 1])
            await asyncio.sleep(0)
        assert (await reader.read()).count(b"HTTP/1.1 ") == begun.count(b"POST")


async def test_a_connection_is_not_idle_while_its_client_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The idle check keeps a connection whose response takes longer than the idle time, and the response is sent."""
    checks = 0
    check_idle = server.ServerProtocol.check_idle

    def counted(protocol: server.ServerProtocol) -> None:
        nonlocal checks
        checks += 1
        check_idle(protocol)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        before = checks
        await until(lambda: checks >= before + 3)
        await echo(scope, receive, send)

    monkeypatch.setattr(server.ServerProtocol, "check_idle", counted)
    async with connected(slow, timeout_keep_alive=0.1) as (side, reader):
        for _ in range(2):
            side.data_received(ASKED)
            assert await said(reader) == "POST /first b'abc'"


async def test_a_request_that_arrives_after_a_long_pause_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The idle check leaves a client the full time for its request, however long the connection was idle before."""
    monkeypatch.setattr(connection, "STALLED_SECONDS", 5.0)
    async with connected(echo, timeout_keep_alive=30) as (side, reader):
        side._idle_since -= 20
        side.data_received(ASKED[:20])
        side.check_idle()
        side.data_received(ASKED[20:])
        assert await said(reader) == "POST /first b'abc'"


async def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the client does not read the last bytes before a close, the connection ends after the timeout."""
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.2)
    async with connected(echo) as (side, _):
        while side.transport.get_write_buffer_size() == 0:
            side.transport.write(bytes(10_000))
            await asyncio.sleep(0)
        assert not side.flow.write_paused
        side.transport.close()
        await until(lambda: not side.connections)
