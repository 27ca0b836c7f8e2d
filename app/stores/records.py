"""A scored image as it is stored, and the id that names it."""

from __future__ import annotations

import os
import struct
import time
import zlib
from typing import NamedTuple

PIXELS = 28 * 28
_HEADER = struct.Struct("<HfI")
_CHECKSUM = struct.Struct("<I")
_FORMAT = 2
MAX_RECORD_BYTES = _HEADER.size + _CHECKSUM.size + 3 * PIXELS + 1024
"""Upper bound of a record's size; a reply has a few hundred bytes."""


class DamagedRecord(ValueError):
    """The bytes of a record have changed, it is the record of another id, or an earlier commit has written it."""


class Record(NamedTuple):
    """A scored image as it is stored: the reply and three pictures.

    Attributes:
        reply: the JSON document that `POST /score` returned.
        pixels: input, reconstruction and error map, uint8 [3, 28, 28], as bytes.
        error_peak: the squared error that 255 means in the error map.
        id: names the record; empty once it has been read.
        owner: name of the API key, or None; only keys of the same name find the record.
    """

    reply: bytes
    pixels: bytes
    error_peak: float
    id: str = ""
    owner: str | None = None

    @property
    def input(self) -> bytes:
        """The image that was scored, uint8 [28, 28]."""
        return self.pixels[:PIXELS]

    @property
    def reconstruction(self) -> bytes:
        """The autoencoder's reconstruction, uint8 [28, 28]."""
        return self.pixels[PIXELS : 2 * PIXELS]

    @property
    def error_map(self) -> bytes:
        """Squared errors as shares of `error_peak`, uint8 [28, 28]."""
        return self.pixels[2 * PIXELS :]

    def pack(self) -> bytes:
        """Return the record as bytes, with a checksum: SQLite and Redis do not notice each damage of a file."""
        content = b"".join((_HEADER.pack(_FORMAT, self.error_peak, len(self.reply)), self.reply, self.pixels))
        return content + _CHECKSUM.pack(_checksum(owned(self.owner, self.id), content))


def unpack(content: bytes, key: str) -> Record:
    """Read what `Record.pack` wrote.

    Args:
        content: the bytes.
        key: under which they were stored: `owned`.

    Raises:
        DamagedRecord: the bytes are not those that were stored under the key.
    """
    if len(content) < _HEADER.size + _CHECKSUM.size:
        raise DamagedRecord("the record is too short")
    end = len(content) - _CHECKSUM.size
    version, peak, length = _HEADER.unpack_from(content)
    (checksum,) = _CHECKSUM.unpack_from(content, end)
    if version != _FORMAT or checksum != _checksum(key, content[:end]):
        raise DamagedRecord("the format or the checksum of the record does not match")
    reply_end = _HEADER.size + length
    return Record(content[_HEADER.size : reply_end], content[reply_end:end], peak)


def _checksum(key: str, content: bytes) -> int:
    return zlib.crc32(key.encode(), zlib.crc32(content))


def new_ids(count: int) -> list[str]:
    """Return new ids: 12 hexadecimal digits of the time in milliseconds, then 128 random bits that cannot be guessed.

    With the time in front, the index of the store grows at its end.
    """
    now, random = f"{time.time_ns() // 1_000_000:012x}", os.urandom(16 * count).hex()
    return [now + random[place : place + 32] for place in range(0, 32 * count, 32)]


def owned(owner: str | None, id: str) -> str:
    """Return the id under which an owner's reconstruction is stored: only keys of the same name find it again."""
    return id if owner is None else f"{owner}/{id}"
