"""Finds the images in a request body: a PNG, a form (RFC 7578) or an array; and the parameters of a form."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from app.http import npy
from app.http.forms import FormReader, Part, boundary_of
from app.images import png
from app.images.formats import SIGNATURE
from app.problems import (
    BodyTooLarge,
    EmptyBody,
    InvalidParameter,
    MissingFile,
    Problem,
    TooManyFiles,
    UnsupportedMediaType,
)
from app.scoring.batch import Chunk

FIELDS = frozenset(("model", "alpha", "fit", "include"))
"""Parameters that a form of `POST /score` may have in addition to its file."""
BATCH_FIELDS = frozenset(("model", "alpha", "fit", "store"))
"""Parameters that a form of `POST /score/batch` may have before its first file."""

_CRLF2 = b"\r\n\r\n"
_BOUNDARY = re.compile(r"boundary=([\w'+.-]{1,200})", re.ASCII)
_FILE_HEADERS = re.compile(
    rb"""(?i:content-disposition:\ form-data);\ name="file";\ filename="[^"\\\x00-\x1f\x7f]*"
         (?:\r\n(?i:content-type):\ [!-~]+)?""",
    re.VERBOSE,
)
_MOST_PARTS = 16
_SLICE = 16 * 1024
"""Number of bytes parsed at a time, which bounds the files that are parsed and not yet scored."""

_CALL = 'curl -H "Content-Type: image/png" --data-binary @image.png URL'
_RIGHT_CALLS = {
    "application/json": f"Decode the base64 text, and send the bytes of the PNG as the body: {_CALL}",
    "text/plain": f"Decode the base64 text, and send the bytes of the PNG as the body: {_CALL}",
    "application/x-www-form-urlencoded": f"curl sends this type by default; name the type of the body: {_CALL}",
}


@dataclass(frozen=True)
class Form:
    """The content of a request body.

    Attributes:
        image: the bytes of the file.
        fields: parameters of a form, by name; the names are among `FIELDS`.
    """

    image: bytes
    fields: dict[str, str]


def read_form(content_type: str, body: bytes) -> Form:
    """Read the body of `POST /score`: a PNG without fields, or a form with one file `file`.

    Raises:
        UnsupportedMediaType: the route does not read this content type.
        MalformedRequest: the form is malformed or does not have exactly one file; the subclass gives the reason.
        InvalidParameter: a field is unknown, given twice, too long or not UTF-8.
    """
    image = plain_image_of(content_type, body)
    if image is not None:
        return Form(image, {})
    reader = FormReader(boundary_of(content_type), "file", fields=FIELDS, largest=len(body), most=_MOST_PARTS)
    files: list[Part] = []
    fields: dict[str, str] = {}
    reader.feed(body)
    reader.finish()
    for part in reader.taken():
        if part.is_file:
            files.append(part)
        elif part.name in fields:
            raise InvalidParameter(f"the field {part.shown} is given twice")
        else:
            fields[part.name] = part.text()
    if len(files) > 1:
        raise TooManyFiles(f"the form has {len(files)} files")
    if not files:
        raise MissingFile("the form has no file in the field `file`")
    if files[0].name != "file":
        raise MissingFile(f"the form has its file in the field {files[0].shown}, not in `file`")
    if not files[0].content:
        raise EmptyBody("the file of the form is empty")
    return Form(bytes(files[0].content), fields)


def plain_image_of(content_type: str, body: bytes) -> bytes | None:
    """Return the image of a body, or None for a form that only `read_form` can read. Errors as for that."""
    kind, _, parameters = content_type.partition(";")
    kind = kind.strip().lower()
    if kind == "multipart/form-data":
        if not body:
            raise EmptyBody("the form has no bytes")
        return _only_part(parameters, body)
    if kind not in ("image/png", "image/x-png", "application/octet-stream", ""):
        hint = _RIGHT_CALLS.get(kind)
        if kind.startswith("image/"):
            hint = "Convert the image to PNG, and send it with Content-Type: image/png."
        raise UnsupportedMediaType(f"the content type is {kind[:80]}", hint=hint)
    if not body:
        raise EmptyBody("the body has no bytes")
    if kind in ("application/octet-stream", "") and not body.startswith(SIGNATURE):
        raise UnsupportedMediaType(f"the content type is {kind or 'missing'}, and the body does not begin as a PNG")
    return body


def _only_part(parameters: str, body: bytes) -> bytes | None:
    """Cut the image out of a form with one part, in the form that browsers and common clients write.

    Returns None for every other form. This takes half the time of the parser.
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


class Chunks(Protocol):
    """The images of a `POST /score/batch` in chunks, read while they arrive.

    Attributes:
        size: number of items per chunk. It may change until the first chunk is read.
        has_files: whether the items are files, and not pixels of an array.
    """

    size: int
    has_files: bool

    async def fields(self) -> Mapping[str, str]:
        """Return the parameters before the first file."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...


def chunks(content_type: str, body: AsyncIterator[bytes], *, size: int, largest_file: int, most_files: int) -> Chunks:
    """Return the images of a body of `POST /score/batch` in chunks of `size`.

    Args:
        content_type: the header Content-Type.
        body: the body in pieces.
        size: number of items per chunk.
        largest_file: maximum number of bytes of a file. A larger one becomes a problem of its item.
        most_files: maximum number of files of a form. An array is limited by the bytes of its body.

    Raises (here, by `fields` or while iterating):
        UnsupportedMediaType: the body is neither an array nor a form.
        BodyTooLarge: a form has more than `most_files` files.
        MalformedRequest: the body is malformed; the subclass gives the reason.
        InvalidParameter: a field is unknown, given twice, invalid, or after a file.
        WrongArray: the array is not uint8 [N, 28, 28].
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind in ("application/x-npy", "application/octet-stream", ""):
        return _ArrayChunks(body, size, declared=kind == "application/x-npy")
    if kind == "multipart/form-data":
        boundary = boundary_of(content_type)
        reader = FormReader(
            boundary, "files", fields=BATCH_FIELDS, largest=largest_file, most=most_files, streamed=True
        )
        return _FormChunks(reader, body, size)
    raise UnsupportedMediaType(f"the content type is {kind[:80]}")


class _ArrayChunks:
    """An npy array, which has no parameters."""

    has_files = False

    def __init__(self, body: AsyncIterator[bytes], size: int, *, declared: bool) -> None:
        self.size = size
        self._body = body
        self._declared = declared

    async def fields(self) -> Mapping[str, str]:
        return {}

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return npy.read_array(self._body, self.size, declared=self._declared)


class _FormChunks:
    """A form: parameters, then files."""

    has_files = True

    def __init__(self, reader: FormReader, body: AsyncIterator[bytes], size: int) -> None:
        self.size = size
        self._reader = reader
        self._parts = self._parse(body)
        self._fields: dict[str, str] | None = None
        self._files: list[Part] = []
        self._has_files = False

    async def fields(self) -> Mapping[str, str]:
        if self._fields is not None:
            return self._fields
        self._fields = {}
        async for parts in self._parts:
            for part in parts:
                if part.is_file:
                    self._files.append(part)
                elif part.name in self._fields:
                    raise InvalidParameter(f"the field {part.shown} is given twice")
                else:
                    self._fields[part.name] = part.text()
            if self._reader.file_begun:
                break
        return self._fields

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        await self.fields()
        chunk = Chunk()
        while True:
            files, self._files = self._files, []
            self._has_files = self._has_files or bool(files)
            for file in files:
                _add(chunk, file)
                if chunk.count == self.size:
                    yield chunk
                    chunk = Chunk()
            try:
                self._files = await anext(self._parts)
            except StopAsyncIteration:
                break
        if not self._has_files:
            raise MissingFile("the form has no file in the field `files`")
        if chunk.count:
            yield chunk

    async def _parse(self, body: AsyncIterator[bytes]) -> AsyncIterator[list[Part]]:
        """Yield the parts that each slice of the body completes."""
        empty = True
        async for piece in body:
            empty = empty and not piece
            for start in range(0, len(piece), _SLICE):
                try:
                    self._reader.feed(piece[start : start + _SLICE])
                except Problem:
                    # A problem of an earlier part comes first, as it does if the parts arrive one by one.
                    yield self._reader.taken()
                    raise
                yield self._reader.taken()
                await asyncio.sleep(0)  # a compressed form can have thousands of files that have arrived
        if empty:
            raise EmptyBody("the form has no bytes")
        self._reader.finish()


def _add(chunk: Chunk, part: Part) -> None:
    began = time.perf_counter()
    try:
        if part.size > len(part.content):
            raise BodyTooLarge(f"the file has {part.size} bytes, the maximum is {part.largest}")
        chunk.pixels += png.decode(bytes(part.content))
    except Problem as problem:
        # The traceback would refer to the chunk: a reference cycle that only the garbage collector frees.
        chunk.problems[chunk.count] = problem.with_traceback(None)
    chunk.count += 1
    chunk.decode_seconds += time.perf_counter() - began
