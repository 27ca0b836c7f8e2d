"""From the messages of an ASGI server to the bytes of one image.

Knows: ASGI, multipart. Does not know: PNG, models.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any

from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.concurrency.deadlines import Deadlines
from app.problems import (
    BodyTimeout,
    BodyTooLarge,
    EmptyBody,
    MalformedMultipart,
    MissingFile,
    TooManyFiles,
    UnsupportedMediaType,
)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_CRLF2 = b"\r\n\r\n"
_BOUNDARY = re.compile(r"boundary=([\w'+.-]+)", re.ASCII)
_FILE_HEADERS = re.compile(
    rb"""(?i:content-disposition:\ form-data);\ name="file";\ filename="[^"\\\x00-\x1f\x7f]*"
         (?:\r\n(?i:content-type):\ [!-~]+)?""",
    re.VERBOSE,
)


class ClientLeft(Exception):
    """The client closed the connection before its request was whole; nobody is there to answer."""


class BodyReader:
    """Reads whole request bodies.

    Args:
        timeout: seconds in which a whole body must arrive.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._deadlines: Deadlines[asyncio.Task[Any]] = Deadlines(timeout, self._interrupt)
        self._interrupted: set[asyncio.Task[Any]] = set()

    async def read(self, receive: Receive, *, declared: bytes | None, limit: int) -> bytes:
        """Read one body.

        Args:
            receive: the ASGI channel.
            declared: the header Content-Length, when there is one.
            limit: most bytes.

        Raises:
            BodyTooLarge: by its declaration or by what came, chunked bodies included.
            BodyTimeout: it did not arrive in time.
            ClientLeft: the connection closed first.
        """
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise BodyTooLarge(f"the body has {int(declared)} bytes, the limit is {limit}")
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
            # If somebody else has cancelled the task as well, that counts.
            if task in self._interrupted and task.uncancel() == 0:
                raise BodyTimeout(f"the body was not complete after {self._timeout:g} s") from None
            raise
        finally:
            self._deadlines.end(task)
            self._interrupted.discard(task)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _interrupt(self, task: asyncio.Task[Any]) -> None:
        self._interrupted.add(task)
        task.cancel()


async def image_of(content_type: str, body: bytes) -> bytes:
    """Return the image that a body carries: the body itself, or the one file of a form.

    Raises:
        UnsupportedMediaType: neither `image/png` nor `multipart/form-data`.
        MalformedRequest: one of its kinds says what is wrong with the form.
    """
    return plain_image_of(content_type, body) or await _parsed(content_type, body)


def plain_image_of(content_type: str, body: bytes) -> bytes | None:
    """Return what `image_of` returns, or None for a form that only the full parser can judge. Errors as for it."""
    kind, _, parameters = content_type.partition(";")
    kind = kind.strip().lower()
    if kind == "image/png":
        if not body:
            raise EmptyBody("the body has no bytes")
        return body
    if kind != "multipart/form-data":
        raise UnsupportedMediaType(f"the content type is {kind[:80] or 'missing'}")
    if not body:
        raise EmptyBody("the form has no bytes")
    return _only_part(parameters, body)


def _only_part(parameters: str, body: bytes) -> bytes | None:
    """Cut the image out of a form with exactly one part, the way browsers and common clients write it.

    Returns None for everything else, which the full parser then judges.
    """
    boundary = _BOUNDARY.fullmatch(parameters.strip())
    if boundary is None:
        return None
    opening = b"--" + boundary[1].encode()
    ending = b"\r\n" + opening + b"--"
    head_end = body.find(_CRLF2)
    if head_end < 0 or not body.startswith(opening + b"\r\n"):
        return None
    if not _FILE_HEADERS.fullmatch(body, len(opening) + 2, head_end):
        return None
    start = head_end + len(_CRLF2)
    end = body.find(b"\r\n" + opening, start)
    if end < 0 or not body.startswith(ending, end) or body[end + len(ending) :] not in (b"", b"\r\n"):
        return None
    return body[start:end] or None


async def _parsed(content_type: str, body: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    parser = MultiPartParser(
        Headers({"content-type": content_type}), stream(), max_files=16, max_fields=16, max_part_size=len(body) + 1
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many" in error.message:
            raise TooManyFiles("the form has too many parts") from None
        raise MalformedMultipart("the form does not follow its boundary") from None
    except (MultipartParseError, KeyError, ValueError, UnicodeError):
        raise MalformedMultipart("the form does not follow its boundary") from None
    try:
        files = form.getlist("file")
        uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if len(files) > 1 or len(uploads) > 1:
            raise TooManyFiles(f"the form has {max(len(files), len(uploads))} files")
        if not files or not isinstance(files[0], UploadFile):
            raise MissingFile("a part named `file` with a file name is needed")
        content = await files[0].read()
    finally:
        await form.close()
    if not content:
        raise EmptyBody("the part `file` has no bytes")
    return content
