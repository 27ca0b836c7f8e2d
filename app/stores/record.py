"""What is kept of a scored image: the reply and three pictures, as one block of bytes."""

from __future__ import annotations

import struct
from typing import NamedTuple

PIXELS = 28 * 28
_HEADER = struct.Struct("<HfI")
_FORMAT = 1
SIZE_BOUND = _HEADER.size + 3 * PIXELS + 1024
"""No record is larger, in bytes: a reply has a few hundred."""


class Record(NamedTuple):
    """A scored image.

    Attributes:
        reply: the JSON document that `POST /score` answered.
        pixels: input, reconstruction and error map, uint8 [3, 28, 28], as bytes.
        error_peak: the squared error that 255 stands for in the error map.
    """

    reply: bytes
    pixels: bytes
    error_peak: float

    @property
    def input(self) -> bytes:
        """The image as the model saw it, uint8 [28, 28]."""
        return self.pixels[:PIXELS]

    @property
    def reconstruction(self) -> bytes:
        """What the autoencoder redrew, uint8 [28, 28]."""
        return self.pixels[PIXELS : 2 * PIXELS]

    @property
    def error_map(self) -> bytes:
        """Squared errors as shares of `error_peak`, uint8 [28, 28]."""
        return self.pixels[2 * PIXELS :]

    def pack(self) -> bytes:
        """Return the record as bytes."""
        return _HEADER.pack(_FORMAT, self.error_peak, len(self.reply)) + self.reply + self.pixels


def unpack(content: bytes) -> Record:
    """Read what `Record.pack` wrote.

    Raises:
        ValueError: the bytes are not a record of this format.
    """
    if len(content) < _HEADER.size:
        raise ValueError("not a record")
    version, peak, length = _HEADER.unpack_from(content)
    reply_end = _HEADER.size + length
    if version != _FORMAT or len(content) != reply_end + 3 * PIXELS:
        raise ValueError("not a record of this format")
    return Record(content[_HEADER.size : reply_end], content[reply_end:], peak)
