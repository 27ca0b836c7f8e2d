"""The images of a request: read from JSON data, or from the binary tensors after the JSON while these arrive."""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import numpy as np

from app.http.inference_protocol.documents import InputTensor
from app.http.npy import PIXELS, count_images
from app.problems import BodyTooLarge, InvalidImage, MalformedRequest, NotAPng, Problem, WrongArray
from app.scoring.batch import Chunk

Decode = Callable[[bytes], Awaitable[bytes]]
"""Returns the pixels of an encoded image, uint8 [28, 28], or raises `InvalidImage`."""

_KINDS = "Send the datatype UINT8 of shape [N, 1, 28, 28] or [N, 28, 28], or BYTES of shape [N] with encoded PNGs."
_MOST_AXES = 4
_UNINTERRUPTED = 16
"""Number of images that are decoded in one event-loop iteration."""
_PREFIX = 4
"""Number of bytes of the length before an element of type BYTES."""


class Body:
    """A request body that is read in exact numbers of bytes while it arrives.

    Args:
        pieces: the decoded body.
        on_bytes: called with the number of bytes so far; may raise a problem.
    """

    def __init__(self, pieces: AsyncIterator[bytes], on_bytes: Callable[[int], object] = lambda _: None) -> None:
        self._pieces = pieces
        self._on_bytes = on_bytes
        self._buffer = bytearray()
        self._size = 0

    async def take(self, count: int) -> bytearray:
        """Return the next `count` bytes.

        Raises:
            MalformedRequest: the body ends before them.
        """
        while len(self._buffer) < count:
            if not await self._read():
                raise MalformedRequest(f"the body ends {count - len(self._buffer)} bytes early")
        taken = self._buffer[:count]
        del self._buffer[:count]
        return taken

    async def rest(self, limit: int, too_large: Callable[[str], Problem]) -> bytes:
        """Return all further bytes; raise the problem `too_large` returns if there are more than `limit`."""
        while len(self._buffer) <= limit and await self._read():
            pass
        if len(self._buffer) > limit:
            raise too_large(f"the body has more than {limit} bytes")
        content, self._buffer = bytes(self._buffer), bytearray()
        return content

    async def expect_end(self) -> None:
        """Check that there are no further bytes.

        Raises:
            MalformedRequest: there are.
        """
        while not self._buffer:
            if not await self._read():
                return
        raise MalformedRequest("the body has more bytes than its tensors declare")

    async def _read(self) -> bool:
        try:
            piece = await anext(self._pieces)
        except StopAsyncIteration:
            return False
        self._size += len(piece)
        self._on_bytes(self._size)
        self._buffer += piece
        return True


def body_of(content: bytes) -> Body:
    """Return a body that is complete."""

    async def once() -> AsyncIterator[bytes]:
        yield content

    return Body(once())


def count_of(tensor: InputTensor) -> int:
    """Return the number of images of an input.

    Raises:
        WrongArray: the service does not accept the datatype or the shape, or there is no image.
    """
    shape = tuple(tensor.shape)
    if tensor.datatype == "UINT8":
        count = count_images(shape)
    elif tensor.datatype == "BYTES":
        if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
            raise WrongArray(f"the BYTES tensor has the shape {list(shape)}", hint=_KINDS)
        count = shape[0]
    else:
        raise WrongArray(f"the datatype is {tensor.datatype[:20]}", hint=_KINDS)
    if count == 0:
        raise WrongArray("the tensor has no images", hint=_KINDS)
    return count


def check_size(tensor: InputTensor, count: int, size: int) -> None:
    """Compare the declared size of a binary UINT8 tensor with its shape.

    Raises:
        MalformedRequest: they differ.
    """
    if tensor.datatype == "UINT8" and size != count * PIXELS:
        raise MalformedRequest(f"`binary_data_size` is {size}, the shape has {count * PIXELS} bytes")


async def pixel_chunks(body: Body, count: int, size: int) -> AsyncIterator[Chunk]:
    """Yield `count` images of raw pixels, uint8 [28, 28] each, in chunks of `size`.

    Raises:
        MalformedRequest: the body has more or fewer bytes.
    """
    for start in range(0, count, size):
        images = min(size, count - start)
        yield Chunk(images, await body.take(images * PIXELS))
    await body.expect_end()


async def encoded_chunks(
    elements: AsyncIterator[bytes], size: int, decode: Decode, *, largest: int
) -> AsyncIterator[Chunk]:
    """Yield encoded images in chunks of `size`.

    Args:
        elements: encoded images.
        size: number of images per chunk.
        decode: decodes one image.
        largest: maximum number of bytes of an image.

    Raises:
        Problem: an image cannot be decoded; its detail names the image. The whole request then fails, because the
            outputs of the protocol have no place for the problem of a single image.
    """
    chunk, index = Chunk(), 0
    async for element in elements:
        if index % _UNINTERRUPTED == 0:  # a compressed body can have thousands of images that have arrived
            await asyncio.sleep(0)
        began = time.perf_counter()
        try:
            if not element:
                raise NotAPng("it has no bytes", hint=_KINDS)
            if len(element) > largest:
                raise BodyTooLarge(f"it has {len(element)} bytes, the maximum is {largest}")
            chunk.pixels += await decode(element)
        except Problem as problem:
            problem.detail = f"image {index}: {problem.detail or problem.title}"
            raise
        chunk.decode_seconds += time.perf_counter() - began
        chunk.count, index = chunk.count + 1, index + 1
        if chunk.count == size:
            yield chunk
            chunk = Chunk()
    if chunk.count:
        yield chunk


async def binary_elements(body: Body, count: int, size: int, *, largest: int) -> AsyncIterator[bytes]:
    """Yield the elements of a binary tensor of type BYTES.

    Args:
        body: begins with the tensor.
        count: number of elements.
        size: number of bytes of the tensor.
        largest: maximum number of bytes of an element.

    Raises:
        MalformedRequest: an element exceeds the tensor, or bytes are left over.
        BodyTooLarge: an element has more than `largest` bytes.
    """
    rest = size
    for index in range(count):
        if rest < _PREFIX:
            raise MalformedRequest(f"the BYTES tensor ends before element {index} of {count}")
        length = int.from_bytes(await body.take(_PREFIX), "little")
        rest -= _PREFIX + length
        if rest < 0:
            raise MalformedRequest(f"element {index} of the BYTES tensor has {-rest} bytes more than the tensor")
        if length > largest:
            raise BodyTooLarge(f"image {index} has {length} bytes, the maximum is {largest}")
        yield bytes(await body.take(length))
    if rest:
        raise MalformedRequest(f"the BYTES tensor has {rest} bytes after its last element")
    await body.expect_end()


async def json_elements(values: Iterable[Any]) -> AsyncIterator[bytes]:
    """Yield encoded images from base64 texts.

    Raises:
        NotAPng: a value is not base64.
    """
    for index, value in enumerate(values):
        try:
            yield base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError, TypeError):
            hint = "In JSON, an encoded image is its bytes in base64."
            raise NotAPng(f"image {index} is not base64", hint=hint) from None


def flat_values(tensor: InputTensor, count: int) -> list[Any]:
    """Return the JSON data of a BYTES tensor as a list of `count` values.

    Raises:
        MalformedRequest: the data is not a list of that length, or of lists of one value each.
    """
    data = tensor.data
    values = [each[0] if isinstance(each, list) and len(each) == 1 else each for each in data] if _is(data) else []
    if len(values) != count:
        raise MalformedRequest(f"`data` is not a list of {count} values, as the shape declares")
    return values


def json_pixels(data: Any, count: int, member: str = "data", *, flat: bool = True) -> bytes:
    """Return the pixels of JSON data as uint8 [count, 28, 28].

    Args:
        data: numbers in lists that are nested like images, or in one flat list.
        count: number of images.
        member: of the document, for messages.
        flat: whether the data may be one flat list.

    Raises:
        WrongArray: the values are not whole numbers from 0 to 255, or their lists are not nested like images.
        MalformedRequest: the number of elements differs from that of the images.
    """
    size = _count_integers(data, member)
    if size != count * PIXELS:
        hint = "Each image is a list: add an axis if there is one image." if member != "data" else None
        raise MalformedRequest(f"`{member}` has {size} values, {count} images have {count * PIXELS}", hint=hint)
    try:
        values = np.array(data)
    except (ValueError, OverflowError):
        raise WrongArray(f"the lists of `{member}` differ in length, or are nested too deeply") from None
    if values.dtype.kind not in "iu":
        raise WrongArray(f"`{member}` contains values of more than 64 bits, not whole numbers from 0 to 255")
    # Lists in another order would be scored as another image.
    if not (flat and values.ndim == 1) and count_images(values.shape) != count:
        raise WrongArray(f"the lists of `{member}` are nested as {list(values.shape)}, not as {count} images of 28x28")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise WrongArray(f"`{member}` has values from {low} to {high}, not from 0 to 255")
    return values.astype(np.uint8).tobytes()


def _count_integers(data: Any, member: str) -> int:
    # numpy gives each element the size of the longest text, and reads booleans among numbers as 0 and 1.
    elements, types, axes = [data], {type(data)}, 0
    while types == {list} and axes <= _MOST_AXES:
        elements = list(itertools.chain.from_iterable(elements))
        types, axes = set(map(type, elements)), axes + 1
    if list in types:
        raise WrongArray(f"the lists of `{member}` differ in length, or are nested too deeply")
    others = " and ".join(sorted(kind.__name__ for kind in types - {int}))
    if others:
        raise WrongArray(f"`{member}` contains values of the type {others}, not whole numbers from 0 to 255")
    return len(elements)


def instances(values: list[Any]) -> tuple[bytes, list[str]]:
    """Return the images of v1 `instances`: their pixels if they are arrays, else their base64 texts.

    Args:
        values: arrays of 28x28 numbers, or `{"b64": text}` with an encoded image each.

    Raises:
        InvalidImage, MalformedRequest: as for `json_pixels`, or the instances are of different kinds.
    """
    encoded = [each["b64"] for each in values if isinstance(each, dict) and isinstance(each.get("b64"), str)]
    if len(encoded) == len(values):
        return b"", encoded
    if encoded or not all(map(_is, values)):
        hint = 'Send arrays of 28x28 numbers from 0 to 255, or {"b64": "..."} with encoded PNGs.'
        raise InvalidImage("the instances are not all arrays, or not all encoded images", hint=hint)
    return json_pixels(values, len(values), "instances", flat=False), []


def _is(value: Any) -> bool:
    return isinstance(value, list)
