"""Slow, independent decoders that the targets compare with: PNG by Pillow and by numpy, npy by numpy."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """Return kind and content of each chunk up to IEND."""
    found, at = [], len(SIGNATURE)
    while at + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        found.append((kind, png[at + 8 : at + 8 + length]))
        at += length + 12
        if kind == b"IEND":
            break
    return found


def chunk_of(kind: bytes, content: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def with_checksums(png: bytes) -> bytes:
    """Return a file in which the CRC of each complete chunk is right."""
    repaired, at = bytearray(png), len(SIGNATURE)
    while at + 12 <= len(repaired):
        (length,) = struct.unpack_from(">I", repaired, at)
        if at + 12 + length > len(repaired):
            break
        struct.pack_into(">I", repaired, at + 8 + length, zlib.crc32(repaired[at + 4 : at + 8 + length]))
        at += length + 12
    return bytes(repaired)


def grey_by_pillow(png: bytes) -> np.ndarray:
    """Return the pixels of an accepted file as Pillow's general reader gives them, uint8 [28, 28]."""
    # The service ignores ancillary chunks but tRNS, and so their damage.
    needed = [each for each in chunks_of(png) if each[0] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")]
    with Image.open(io.BytesIO(SIGNATURE + b"".join(chunk_of(kind, content) for kind, content in needed))) as image:
        image.load()
        if image.mode in ("I;16", "I;16B", "I"):
            return (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        # By way of RGBA: Pillow warns of a palette whose transparency it drops.
    return _median(np.asarray(image.convert("RGBA").convert("RGB")))


def grey_by_numpy(png: bytes) -> np.ndarray | None:
    """Return the pixels of an accepted file, uint8 [28, 28], by the PNG specification; None if it is interlaced."""
    parts = chunks_of(png)
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", parts[0][1])
    if interlace:
        return None
    channels = _CHANNELS[colour]
    row_bytes = (width * channels * depth + 7) // 8
    compressed = b"".join(content for kind, content in parts if kind == b"IDAT")
    # The service reads no further than the last row, so that a damaged end of the stream does not matter.
    data = zlib.decompressobj().decompress(compressed, height * (row_bytes + 1))
    lines = _unfiltered(data, height, row_bytes, max(1, channels * depth // 8))
    if depth < 8:
        samples = np.unpackbits(lines, axis=1).reshape(height, -1, depth)
        samples = (samples << np.arange(depth - 1, -1, -1, dtype=np.uint8)).sum(2).astype(np.uint8)[:, :width]
        if colour == 0:
            return samples * np.uint8(255 // ((1 << depth) - 1))
    else:
        samples = lines.reshape(height, width, channels, depth // 8)[..., 0]
    if colour == 3:
        palette = np.frombuffer(next(content for kind, content in parts if kind == b"PLTE"), np.uint8).reshape(-1, 3)
        return _median(palette[samples.reshape(height, width)])
    samples = samples.reshape(height, width, channels)
    return _median(samples[..., :3]) if channels >= 3 else samples[..., 0]


def array_by_numpy(body: bytes) -> np.ndarray | None:
    """Return the images of an npy file without bytes after them, or None if numpy does not read such images."""
    stream = io.BytesIO(body)
    try:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception:  # numpy documents no complete list
        return None
    if array.dtype != np.uint8 or array.shape[1:] not in ((28, 28), (1, 28, 28)) or stream.read(1):
        return None
    return array


def _unfiltered(data: bytes, height: int, row_bytes: int, step: int) -> np.ndarray:
    lines = np.zeros((height, row_bytes), np.uint8)
    above = bytearray(row_bytes)
    for row in range(height):
        start = row * (row_bytes + 1)
        kind, line = data[start], bytearray(data[start + 1 : start + 1 + row_bytes])
        for at in range(row_bytes):
            left = line[at - step] if at >= step else 0
            corner = above[at - step] if at >= step else 0
            line[at] = (line[at] + _predicted(kind, left, above[at], corner)) & 255
        lines[row], above = np.frombuffer(bytes(line), np.uint8), line
    return lines


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind == 4:
        estimate = left + up - corner
        return min((left, up, corner), key=lambda each: abs(estimate - each))
    return (0, left, up, (left + up) // 2)[kind]


def _median(colours: np.ndarray) -> np.ndarray:
    return np.median(colours, axis=2).astype(np.uint8)
