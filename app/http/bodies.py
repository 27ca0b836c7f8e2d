"""Reads request bodies from ASGI, within a size and a time, and undoes their Content-Encoding."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from typing import Any, TypeVar

from app.concurrency.deadlines import Deadlines
from app.problems import BodyTimeout, BodyTooLarge, MalformedRequest, UnsupportedEncoding

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Result = TypeVar("Result")

_GZIP = 16 + zlib.MAX_WBITS
_PIECE = 64 * 1024
"""Maximum number of bytes that are decoded at a time."""
_SLICE = 16 * 1024
"""Maximum number of encoded bytes that are decoded at a time: each member of a gzip file copies the rest of them."""
_FEW_MEMBERS = 64
_BYTES_PER_MEMBER = 4096
"""Minimum mean size of the members of a gzip file that has more than a few."""


class ClientLeft(Exception):
    """The client closed the connection before its request was complete."""


class BodyReader:
    """Reads complete request bodies.

    Args:
        timeout: time limit for a complete body, in seconds.
        clock: monotonic seconds.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._deadlines: Deadlines[asyncio.Task[Any]] = Deadlines(timeout, self._interrupt, clock)
        self._interrupted: set[asyncio.Task[Any]] = set()

    async def read(self, receive: Receive, *, declared: bytes | None, limit: int) -> bytes:
        """Read one body.

        Args:
            receive: the ASGI channel.
            declared: the header Content-Length, if there is one.
            limit: maximum number of bytes.

        Raises:
            BodyTooLarge: the declared or the received length exceeds the limit.
            BodyTimeout: the body is incomplete after the time limit.
            ClientLeft: the client closed the connection.
        """
        _check_declared(declared, limit)
        task = asyncio.current_task()
        assert task is not None
        parts: list[bytes] = []
        size, more = 0, True
        self._deadlines.begin(task)
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise BodyTooLarge(f"the body has more than {limit} bytes")
                more = message.get("more_body", False)
        except asyncio.CancelledError:
            # A cancellation by another caller takes precedence over the time limit.
            if task in self._interrupted and task.uncancel() == 0:
                raise BodyTimeout(f"the body was incomplete after {self._timeout:g} s") from None
            raise
        finally:
            self._deadlines.end(task)
            self._interrupted.discard(task)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _interrupt(self, task: asyncio.Task[Any]) -> None:
        self._interrupted.add(task)
        task.cancel()


async def pieces(
    receive: Receive,
    *,
    declared: bytes | None,
    limit: int,
    timeout: float,
    slowest: float,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[bytes]:
    """Yield a request body as it arrives.

    Args:
        receive: the ASGI channel.
        declared: the header Content-Length, if there is one.
        limit: maximum number of bytes.
        timeout: time limit for each piece, in seconds.
        slowest: minimum rate in bytes per second. The total waiting time may be `timeout` plus the time that the
            received bytes take at this rate.
        clock: monotonic seconds.

    Raises:
        BodyTooLarge, BodyTimeout, ClientLeft: `BodyReader.read` describes them.
    """
    _check_declared(declared, limit)
    size, waited, more = 0, 0.0, True
    while more:
        # Only the time spent waiting for the client counts, not the time the service takes between two pieces.
        began = clock()
        try:
            async with asyncio.timeout(min(timeout, timeout + size / slowest - waited)):
                message = await receive()
        except TimeoutError:
            detail = f"no bytes arrived for {timeout:g} s, or fewer than {slowest:g} bytes per second"
            raise BodyTimeout(detail) from None
        waited += clock() - began
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > limit:
            raise BodyTooLarge(f"the body has more than {limit} bytes")
        yield piece


def decoded(encoding: bytes | None, body: bytes, *, limit: int) -> bytes:
    """Undo the Content-Encoding of a complete body.

    Args:
        encoding: the header Content-Encoding, if there is one.
        body: the bytes that arrived.
        limit: maximum number of decoded bytes.

    Raises:
        UnsupportedEncoding: the encoding is neither gzip nor deflate.
        BodyTooLarge: the decoded body exceeds the limit.
        MalformedRequest: the body does not have the declared encoding.
    """
    decoder = _decoder(encoding, limit)
    if decoder is None or not body:
        return body
    content = b"".join(decoder.decode(body))
    decoder.finish()
    return content


async def decoded_pieces(encoding: bytes | None, body: AsyncIterator[bytes], *, limit: int) -> AsyncIterator[bytes]:
    """Undo the Content-Encoding of a body as it arrives. Arguments and errors as for `decoded`."""
    decoder = _decoder(encoding, limit)
    async for piece in body:
        if decoder is None:
            yield piece
        else:
            for part in decoder.decode(piece):
                yield part
                await asyncio.sleep(0)  # a small piece may decode to megabytes, which keep their reader busy
    if decoder is not None:
        decoder.finish()


def _check_declared(declared: bytes | None, limit: int) -> None:
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"the body has {int(declared)} bytes, the limit is {limit}")


def _decoder(encoding: bytes | None, limit: int) -> _Decoder | None:
    name = (encoding or b"").decode("latin-1").strip().lower()
    if name in ("", "identity"):
        return None
    if name not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedEncoding(f"the content encoding is {name[:80]}")
    return _Decoder(name.removeprefix("x-"), limit)


class _Decoder:
    """Inflates a body piece by piece and stops at its limit, however little a bomb has of compressed bytes."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._size = 0
        self._inflater = zlib.decompressobj(_GZIP) if name == "gzip" else None
        self._start = b""
        self._members = 1

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield what the next bytes of the body decode to."""
        for start in range(0, len(data), _SLICE):
            yield from self._decode_slice(data[start : start + _SLICE])

    def _decode_slice(self, data: bytes) -> Iterator[bytes]:
        full = False
        while data or full:
            if self._inflater is None:
                data = self._start = self._start + data
                if len(data) < 2:
                    return
                self._inflater = zlib.decompressobj(_deflate_format(data))
            elif self._inflater.eof:
                if self._name != "gzip":
                    raise self._malformed()
                self._members += 1  # A gzip file may have several.
                if self._members > _FEW_MEMBERS + self._size // _BYTES_PER_MEMBER:
                    raise MalformedRequest(f"the body has {self._members} gzip members for {self._size} bytes")
                self._inflater = zlib.decompressobj(_GZIP)
            most = min(_PIECE, self._limit - self._size + 1)
            try:
                content = self._inflater.decompress(data, most)
            except zlib.error:
                raise self._malformed() from None
            data = self._inflater.unconsumed_tail or self._inflater.unused_data
            full = len(content) == most and not self._inflater.eof  # More may come without another byte of input.
            self._size += len(content)
            if self._size > self._limit:
                raise BodyTooLarge(f"the decoded body has more than {self._limit} bytes")
            if content:
                yield content

    def finish(self) -> None:
        """Check that the encoded data is complete."""
        if self._inflater is None or not self._inflater.eof:
            raise self._malformed()

    def _malformed(self) -> MalformedRequest:
        hint = f"Send the complete body in the {self._name} format, or without Content-Encoding."
        return MalformedRequest(f"the body is not complete, valid {self._name} data", hint=hint)


def _deflate_format(start: bytes) -> int:
    """Return zlib's window bits: some clients send `deflate` without the zlib header that RFC 9110 requires."""
    has_header = start[0] & 0x0F == zlib.DEFLATED and int.from_bytes(start[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


async def finished(work: Awaitable[None], scope: MutableMapping[str, Any], receive: Receive) -> None:
    """Wait for the work of a request. A `GET` request, whose work reads no body, ends when its client leaves.

    Raises:
        ClientLeft: the client closed its connection first.
    """
    await (unless_disconnected(work, receive) if scope["method"] == "GET" else work)


async def unless_disconnected(work: Awaitable[Result], receive: Receive) -> Result:
    """Return the result of work, which is cancelled if the client closes its connection.

    Args:
        work: what the client waits for.
        receive: of the request, whose body is complete or of no interest.

    Raises:
        ClientLeft: the client closed its connection first.
    """
    future = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((future, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ClientLeft
        return await future
    finally:
        future.cancel()
        disconnect.cancel()
        del future, work  # its error refers to this frame: they would be a cycle


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
