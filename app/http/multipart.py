"""From a body that arrives piece by piece to chunks of images, with memory that does not grow with the body.

Knows: ASGI, the npy format, multipart. Does not know: models.
"""

from __future__ import annotations

import ast
import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.http.bodies import ClientLeft, Receive
from app.images import png
from app.problems import (
    BodyTimeout,
    BodyTooLarge,
    EmptyBody,
    MalformedArray,
    MalformedMultipart,
    Problem,
    UnsupportedMediaType,
    WrongArray,
)
from app.scoring.batch import Chunk

if TYPE_CHECKING:  # the name exists for type checkers alone
    from python_multipart.multipart import MultipartCallbacks

PIXELS = 28 * 28
_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 4096
_MOST_HEADERS = 16
_TOO_MANY = 2**63
"""Images: numpy counts in 64 bits with a sign. How many may come is bounded by their bytes."""


async def pieces(
    receive: Receive, *, declared: bytes | None, limit: int, timeout: float, slowest: float
) -> AsyncIterator[bytes]:
    """Yield a request's body as it arrives.

    Args:
        receive: the ASGI channel.
        declared: the header Content-Length, when there is one.
        limit: most bytes.
        timeout: seconds in which each next piece must arrive.
        slowest: bytes a second; all the waiting together may take `timeout` and what this rate makes of the bytes.

    Raises:
        BodyTooLarge, BodyTimeout, ClientLeft: as for `app.http.bodies.BodyReader`.
    """
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"the body has {int(declared)} bytes, the limit is {limit}")
    size, waited, more = 0, 0.0, True
    while more:
        # Only what the client makes the service wait counts, not what the service makes the client wait.
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(timeout, timeout + size / slowest - waited)):
                message = await receive()
        except TimeoutError:
            raise BodyTimeout(f"nothing of the body for {timeout:g} s, or less than {slowest:g} bytes a s") from None
        waited += time.monotonic() - began
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > limit:
            raise BodyTooLarge(f"the body has more than {limit} bytes")
        yield piece


def chunks(
    content_type: str, body: AsyncIterator[bytes], *, size: int, largest_file: int, most_files: int
) -> AsyncIterator[Chunk]:
    """Return the chunks, of up to `size` items, of a body of either form.

    Raises (here or while iterating):
        UnsupportedMediaType: the body is neither an array nor a form.
        BodyTooLarge: a form has more than `most_files` files. An array is bounded by its bytes.
        MalformedArray, WrongArray, MalformedMultipart, EmptyBody: it is not what it claims to be.
    """
    kind, parameters = parse_options_header(content_type)
    if kind == b"application/x-npy":
        return _of_array(body, size)
    if kind == b"multipart/form-data":
        return _of_form(parameters.get(b"boundary", b""), body, size, _Form(largest_file, most_files))
    raise UnsupportedMediaType(f"the content type is {content_type[:80] or 'missing'}")


async def _of_array(body: AsyncIterator[bytes], size: int) -> AsyncIterator[Chunk]:
    buffer = bytearray()
    count: int | None = None
    done = 0
    async for piece in body:
        buffer += piece
        if count is None:
            header = array_header(bytes(buffer[: _LONGEST_HEADER + 12]))
            if header is None:
                continue
            count, offset = header
            del buffer[:offset]
        while len(buffer) >= size * PIXELS and done + size <= count:
            yield Chunk(size, buffer[: size * PIXELS])
            del buffer[: size * PIXELS]
            done += size
        if len(buffer) > (count - done) * PIXELS:
            raise MalformedArray(f"there are bytes after the {count} images that the header declares")
    if count is None:
        raise (MalformedArray("the body ends inside its header") if buffer else EmptyBody("the body has no bytes"))
    if len(buffer) != (count - done) * PIXELS:
        raise MalformedArray(f"the body ends before the {count} images that its header declares")
    if buffer:
        yield Chunk(count - done, buffer)


def array_header(content: bytes) -> tuple[int, int] | None:
    """Read the header of an npy file without giving it to a general reader.

    Args:
        content: the first bytes.

    Returns:
        The number of images and where they begin; None while the header is not whole.

    Raises:
        MalformedArray: this is no npy file.
        WrongArray: it holds something else than uint8 [N, 28, 28] in C order.
    """
    if content[:6] != _MAGIC[: len(content)]:
        raise MalformedArray("the first bytes are not those of an npy file")
    if len(content) < 12:
        return None
    width = {1: 2, 2: 4, 3: 4}.get(content[6])
    if width is None:
        raise MalformedArray("the npy version is none of 1, 2, 3")
    start = 8 + width
    end = start + int.from_bytes(content[8:start], "little")
    if end - start > _LONGEST_HEADER:
        raise MalformedArray(f"the npy header has more than {_LONGEST_HEADER} bytes")
    if len(content) < end:
        return None
    try:
        header = ast.literal_eval(content[start:end].decode("utf-8"))
        kind, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        raise MalformedArray("the npy header cannot be read") from None
    if kind not in ("|u1", "<u1", ">u1", "u1") or fortran is not False:
        raise WrongArray("the array is not uint8 in C order")
    if not isinstance(shape, tuple) or len(shape) != 3 or shape[1:] != (28, 28) or type(shape[0]) is not int:
        raise WrongArray("the array does not have the shape [N, 28, 28]")
    if not 0 <= shape[0] < _TOO_MANY:  # before it is printed: Python refuses to print thousands of digits
        raise WrongArray("the array's length is negative, or more than any array has")
    return shape[0], end


async def _of_form(boundary: bytes, body: AsyncIterator[bytes], size: int, form: _Form) -> AsyncIterator[Chunk]:
    try:
        parser = MultipartParser(boundary, form.callbacks())
    except (MultipartParseError, ValueError):
        raise MalformedMultipart("the form has no boundary") from None
    chunk, empty = Chunk(), True
    try:
        async for piece in body:
            empty = empty and not piece
            for start in range(0, len(piece), _SLICE):
                parser.write(piece[start : start + _SLICE])
                for item in form.taken():
                    _add(chunk, item)
                    if chunk.count == size:
                        yield chunk
                        chunk = Chunk()
        parser.finalize()
    except MultipartParseError:
        raise MalformedMultipart("the form does not follow its boundary") from None
    if empty:
        raise EmptyBody("the form has no bytes")
    if not form.ended:
        raise MalformedMultipart("the form ends before its last boundary")
    if chunk.count:
        yield chunk


_SLICE = 16 * 1024
"""Bytes parsed at once, so that pictures parsed and not yet scored stay few."""


def _add(chunk: Chunk, item: bytes | Problem) -> None:
    began = time.perf_counter()
    try:
        if isinstance(item, Problem):
            raise item
        chunk.pixels += png.decode(item)
    except Problem as problem:
        chunk.problems[chunk.count] = problem
    chunk.count += 1
    chunk.decode_seconds += time.perf_counter() - began


class _Form:
    """Collects the parts of a form that are called `files`; a part above `largest` bytes becomes a problem."""

    def __init__(self, largest: int, most: int) -> None:
        self.ended = False
        self._largest = largest
        self._most = most
        self._count = 0
        self._items: list[bytes | Problem] = []
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value, self._content = bytearray(), bytearray(), bytearray()
        self._size = 0

    def callbacks(self) -> MultipartCallbacks:
        """Return what the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._check,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def taken(self) -> list[bytes | Problem]:
        """Return the items that are whole and have not been returned before."""
        items, self._items = self._items, []
        return items

    def _begin(self) -> None:
        self._count += 1
        if self._count > self._most:
            raise BodyTooLarge(f"the form has more than {self._most} files; send the others in requests of their own")
        self._headers, self._content, self._size = {}, bytearray(), 0

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]
        self._bounded(len(self._name))

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._bounded(len(self._value))

    def _header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._bounded(len(self._headers), _MOST_HEADERS)
        self._name, self._value = bytearray(), bytearray()

    def _bounded(self, size: int, limit: int = _LONGEST_HEADER) -> None:
        if size > limit:
            raise MalformedMultipart("the headers of a part are too long")

    def _check(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if disposition != b"form-data" or options.get(b"name") != b"files" or b"filename" not in options:
            raise MalformedMultipart("a part is not a file named `files`")
        if b"content-transfer-encoding" in self._headers:
            raise MalformedMultipart("a part has a Content-Transfer-Encoding")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size <= self._largest:
            self._content += data[start:end]

    def _end(self) -> None:
        if self._size > self._largest:
            self._items.append(BodyTooLarge(f"the file has more than {self._largest} bytes"))
        else:
            self._items.append(bytes(self._content))

    def _finish(self) -> None:
        self.ended = True
