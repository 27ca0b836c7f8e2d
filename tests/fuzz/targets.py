"""The fuzz targets: each target takes arbitrary bytes, and raises an exception if a property does not hold.

The docstring of each target states its property. A `Problem` is a reply to the client; any other exception is a fault.
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from app.http import multipart, npy
from app.http.forms import FormReader, boundary_of
from app.images import fit, png
from app.problems import Problem
from app.scoring.batch import Chunk
from tests.fuzz import reference
from tests.fuzz.service import compare_paths

PIXELS = 28 * 28
_FIT_PIXELS = 64 * 1024
"""Maximum number of pixels of `fit`: larger images execute the same code, and take longer."""
_TYPE = "multipart/form-data; boundary=b"


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """Return the result of a call, or the type of the problem that it raises."""
    try:
        return "result", call()
    except Problem as problem:
        return "problem", problem.type


def fuzz_png(data: bytes) -> None:
    """`decode` returns the pixels that Pillow and the specification give, on its fast and on its general path.

    The first byte selects the kind of file: the bytes unchanged, the bytes with correct checksums, or a PNG that is
    built from the bytes.
    """
    file = _png_of(data)
    kind, pixels = outcome(lambda: png.decode(file))
    general, general_pixels = outcome(lambda: _decode_generally(file))
    assert (kind, pixels) == (general, general_pixels), "fast and general path differ"
    if kind == "problem":
        return
    assert len(pixels) == PIXELS
    assert pixels == reference.grey_by_pillow(file).tobytes(), "Pillow's pixels differ"
    by_numpy = reference.grey_by_numpy(file)
    assert by_numpy is None or pixels == by_numpy.tobytes(), "numpy's pixels differ"


def fuzz_fit(data: bytes) -> None:
    """`fit` returns 28x28 pixels or a problem for every file of every format that it reads."""
    file = _png_of(data) if data[:1] < b"\x03" else data[1:]
    kind, fitted = outcome(lambda: fit.fit(file, _FIT_PIXELS))
    if kind == "result":
        assert len(fitted.pixels) == PIXELS


def fuzz_form(data: bytes) -> None:
    """A form of `POST /score` gives the same result on the fast path, in one piece, and in pieces of any size.

    The first two bytes are the seed of the pieces.
    """
    seed, body = data[:2], data[2:]
    whole = outcome(lambda: _parts(body, [body]))
    assert outcome(lambda: _parts(body, list(split(body, seed)))) == whole, "the pieces decide about the result"
    kind, image = outcome(lambda: multipart.plain_image_of(_TYPE, body))
    if kind == "result" and image is not None:
        assert whole == ("result", [("file", True, len(image), image)]), "the fast path reads another image"


def fuzz_forms(data: bytes) -> None:
    """A form of `POST /score/batch` gives the same fields, images and problems in one piece and in pieces."""
    seed, body = data[:2], data[2:]

    async def read(pieces: list[bytes]) -> Any:
        found = multipart.chunks(_TYPE, stream(pieces), size=2, largest_file=2048, most_files=8)
        fields = dict(await found.fields())
        return fields, [_described(chunk) async for chunk in found]

    whole = outcome(lambda: asyncio.run(read([body])))
    assert outcome(lambda: asyncio.run(read(list(split(body, seed))))) == whole, "the pieces decide about the result"


def fuzz_npy(data: bytes) -> None:
    """An array is accepted only if numpy reads the same images. One piece and several pieces give the same result."""
    seed, body = data[:2], data[2:]

    async def read(pieces: list[bytes]) -> bytes:
        return b"".join([bytes(chunk.pixels) async for chunk in npy.read_array(stream(pieces), 2)])

    whole = outcome(lambda: asyncio.run(read([body])))
    assert outcome(lambda: asyncio.run(read(list(split(body, seed))))) == whole, "the pieces decide about the result"
    if whole[0] == "result":
        array = reference.array_by_numpy(body)
        assert array is not None, "numpy does not read this array"
        assert array.tobytes() == whole[1], "numpy reads other images"


def fuzz_score(data: bytes) -> None:
    """`POST /score` gives the same reply on the fast and on the general path, in one packet and in several.

    The first bytes select the query, the content type and the packets.
    """
    if len(data) < 4:
        return
    compare_paths(data[0], data[1], data[4:], list(split(data[4:], data[2:4])))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "png": fuzz_png,
    "fit": fuzz_fit,
    "form": fuzz_form,
    "forms": fuzz_forms,
    "npy": fuzz_npy,
    "score": fuzz_score,
}


def split(body: bytes, seed: bytes) -> list[bytes]:
    """Cut a body into pieces whose sizes depend on the seed. Many pieces have one byte."""
    state, pieces, at = int.from_bytes(seed, "big") or 1, [], 0
    while at < len(body):
        state = (state * 1103515245 + 12345) % 2**31
        size = (1, 2, 3, 7, 64, 1024)[(state >> 16) % 6]
        pieces.append(body[at : at + size])
        at += size
    return pieces


async def stream(pieces: list[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces one by one."""
    for piece in pieces:
        yield piece


def _png_of(data: bytes) -> bytes:
    mode, rest = data[:1], data[1:]
    if mode == b"\x01":
        return reference.with_checksums(rest)
    if mode == b"\x02" and len(rest) >= 6:
        return _built(rest)
    return rest


def _built(data: bytes) -> bytes:
    """Return a PNG with a valid structure. The bytes determine its header, optional chunks and filtered rows."""
    depth, colour, interlace = 1 << data[0] % 5, (0, 2, 3, 4, 6)[data[1] % 5], data[2] % 2
    extra, count = (b"", b"tRNS", b"gAMA", b"tEXt")[data[3] % 4], data[4] % 64
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 28, 28, depth, colour, 0, 0, interlace))]
    if colour == 3:
        parts.append((b"PLTE", (data[5:] * 3)[: 3 * (1 + data[5] % 16)]))
    if extra:
        parts.append((extra, data[6 : 6 + count]))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    size = 28 * (1 + (28 * channels * depth + 7) // 8)
    rows = data[6 + count :]
    rows = (rows * (size // max(1, len(rows)) + 1))[:size] if rows else bytes(size)
    if data[3] & 4:  # rows with valid filters
        line = size // 28
        rows = b"".join(bytes((rows[at] % 5,)) + rows[at + 1 : at + line] for at in range(0, size, line))
    parts += [(b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return reference.SIGNATURE + b"".join(reference.chunk_of(kind, content) for kind, content in parts)


def _decode_generally(file: bytes) -> bytes:
    usual = png._usual
    png._usual = lambda _: b""
    try:
        return png.decode(file)
    finally:
        png._usual = usual


def _parts(body: bytes, pieces: list[bytes]) -> list[tuple[str, bool, int, bytes]]:
    reader = FormReader(boundary_of(_TYPE), "file", fields=multipart.FIELDS, largest=len(body), most=16)
    for piece in pieces:
        reader.feed(piece)
    reader.finish()
    return [(part.name, part.is_file, part.size, bytes(part.content)) for part in reader.taken()]


def _described(chunk: Chunk) -> tuple[int, bytes, dict[int, str]]:
    return chunk.count, bytes(chunk.pixels), {at: problem.type for at, problem in chunk.problems.items()}
