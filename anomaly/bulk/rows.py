"""The columns between reader and scorer, and the columns of the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from app.images.png import SIDE
from app.problems import Problem

PIXELS = SIDE * SIDE
BLOCK = 4096
"""Maximum number of images per block."""
INPUT = pa.schema([("id", pa.string()), ("pixels", pa.binary(PIXELS)), ("error", pa.string()), ("detail", pa.string())])
"""A block of images: raw pixels, uint8 [28, 28] in rows from the top, or the reason why there are none."""
NORMAL, ANOMALOUS, NOT_SCORED = "normal", "anomalous", "not scored"


def result_schema(*, q_values: bool, reconstructions: bool) -> Any:
    """Return the columns of the results.

    `mse` is float64, although the module returns float32: a comparison of a float32 column with the threshold would
    round the threshold first.
    """
    fields = [
        ("id", pa.string()),
        ("mse", pa.float64()),
        ("p_value", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        *([("q_value", pa.float64())] if q_values else []),
        ("model", pa.string()),
        ("version", pa.int32()),
        ("digest", pa.string()),
        ("error", pa.string()),
        ("detail", pa.string()),
        *([("reconstruction", pa.binary())] if reconstructions else []),
    ]
    return pa.schema(fields)


class Refusal(NamedTuple):
    """The reason why an image or a file has no score.

    Attributes:
        error: last part of the problem type that the service returns, or the name of a problem of a file.
        detail: the cause.
    """

    error: str
    detail: str

    @classmethod
    def of(cls, problem: Problem) -> Refusal:
        """Return the reason that the service would give."""
        return cls(problem.type.removeprefix("/problems/"), problem.detail or problem.title)


@dataclass
class BlockBuilder:
    """Collects up to `BLOCK` images."""

    ids: list[str] = field(default_factory=list)
    refusals: dict[int, Refusal] = field(default_factory=dict)
    _pixels: bytearray = field(default_factory=bytearray)

    @property
    def full(self) -> bool:
        """Whether the block has its maximum size."""
        return len(self.ids) >= BLOCK

    def add(self, id: str, pixels: bytes | Refusal) -> None:
        """Add an image, 784 bytes, or the reason why there is none."""
        if isinstance(pixels, Refusal):
            self.refusals[len(self.ids)] = pixels
            pixels = bytes(PIXELS)
        self.ids.append(id)
        self._pixels += pixels

    def take(self) -> Any:
        """Return the block as a table of the schema `INPUT`, and begin a new one."""
        table = block(self.ids, np.frombuffer(self._pixels, np.uint8), self.refusals)
        self.ids, self.refusals, self._pixels = [], {}, bytearray()
        return table


def block(ids: Sequence[str], pixels: NDArray[np.uint8], refusals: dict[int, Refusal] | None = None) -> Any:
    """Return N images as a table of the schema `INPUT`, without copying the pixels.

    Args:
        ids: N ids.
        pixels: uint8, N x 784 values, contiguous.
        refusals: why an image has no pixels, by its place.
    """
    count, valid = len(ids), None
    errors: Any = pa.nulls(count, pa.string())
    details = errors
    if refusals:
        mask = np.ones(count, np.bool_)
        mask[list(refusals)] = False
        valid = pa.array(mask).buffers()[1]
        errors, details = (
            pa.array([getattr(refusals.get(place), name, None) for place in range(count)], pa.string())
            for name in ("error", "detail")
        )
    raw = pa.FixedSizeBinaryArray.from_buffers(pa.binary(PIXELS), count, [valid, pa.py_buffer(pixels)])
    return pa.Table.from_arrays([pa.array(ids, pa.string()), raw, errors, details], schema=INPUT)


def pixels_of(table: Any) -> NDArray[np.uint8]:
    """Return the pixels of a block, uint8 [N, 1, 28, 28]; those of images without pixels are undefined."""
    column = table.column("pixels").combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty column
        return np.zeros((0, 1, SIDE, SIDE), np.uint8)
    start = column.offset * PIXELS
    raw = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * PIXELS]
    return raw.reshape(-1, 1, SIDE, SIDE)
