"""Reads the images of a unit of work as blocks. An unreadable image or file becomes a row with the reason."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anomaly.bulk import arrays
from anomaly.bulk.inputs import DAMAGED_PARQUET, UNREADABLE_ERRORS, Piece, Unit, kind_of, printable
from anomaly.bulk.locations import Location
from anomaly.bulk.rows import BLOCK, PIXELS, BlockBuilder, Refusal, block
from anomaly.image_files import is_hidden
from app.images.prepare import prepared_pixels
from app.models.manifest import Preparation
from app.problems import BodyTooLarge, EmptyBody, MalformedArray, Problem, WrongArray

UNREADABLE = "unreadable-file"
"""The file does not exist any more, or may not be read; or a folder cannot be listed."""
MALFORMED = "malformed-file"
"""The archive or the Parquet file is damaged."""
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, *DAMAGED_PARQUET)
"""Errors that the readers of archives and of Parquet raise for damaged files, besides `OSError`."""


_DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


class _TarMember(tarfile.TarInfo):
    """Member of an archive. `tarfile` takes a damaged header after the first one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Read the next header.

        Raises:
            ReadError: it is damaged, or the archive ends without a block of zeros.
        """
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("a block of zeros is not at the end") from None
            raise
        except tarfile.HeaderError as error:
            if archive.offset == 0:
                raise
            raise tarfile.ReadError(str(error)) from error


def read_all(ids: list[str]) -> list[bool]:
    """Return that every image is to be read."""
    return [True] * len(ids)


@dataclass(frozen=True)
class Reader:
    """Reads units.

    Attributes:
        source: the input.
        column: column of the images in Parquet files.
        preparation: how an image becomes the pixels that the model scores.
        max_bytes: maximum number of bytes of an encoded image.
        max_pixels: maximum number of pixels of an image with `mnist`.
    """

    source: Location
    column: str
    preparation: Preparation
    max_bytes: int
    max_pixels: int

    def blocks(self, unit: Unit, wanted: Callable[[list[str]], list[bool]] = read_all) -> Iterator[Any]:
        """Yield the images of a unit as tables of the schema `rows.INPUT`, with up to `BLOCK` rows each.

        Args:
            unit: the pieces to read.
            wanted: returns for each id whether its image is to be read.

        Raises:
            OSError: the file system failed.
        """
        builder = BlockBuilder()
        for piece in unit:
            for part in self._piece(piece, wanted):
                if isinstance(part, tuple):
                    builder.add(*part)
                    if builder.full:
                        yield builder.take()
                else:
                    yield part
        if builder.ids:
            yield builder.take()

    def _piece(self, piece: Piece, wanted: Callable[[list[str]], list[bool]]) -> Iterator[Any]:
        """Yield blocks, and single images as pairs of an id and pixels or a reason."""
        reason: Refusal | None = None
        try:
            if piece.kind == "image":
                if wanted([piece.name])[0]:
                    yield piece.name, self._decoded(self._file(piece.path))
            elif piece.kind == "parquet":
                yield from self._parquet(piece, wanted)
            elif piece.kind in ("npy", "idx"):
                yield from self._array(piece, wanted)
            else:
                yield from self._archive(piece, wanted)
        except Problem as problem:
            reason = Refusal.of(problem)
        except OSError as error:
            if error.errno in UNREADABLE_ERRORS:
                reason = Refusal(UNREADABLE, error.strerror or str(error))
            elif self._can_be_read(error, piece.path):
                reason = Refusal(MALFORMED, f"the file is damaged: {' '.join(str(error).split())[:200]}")
            else:
                raise
        except _DAMAGED as error:
            reason = Refusal(MALFORMED, f"the file is damaged: {' '.join(str(error).split())[:200]}")
        # Each row group of a Parquet file is a piece.
        id = piece.name if piece.stop is None else f"{piece.name}#row-group-{piece.start}"
        if reason is not None and wanted([id])[0]:
            yield id, reason

    def _can_be_read(self, error: OSError, path: str) -> bool:
        """Return whether an error concerns the content of a file: its bytes can be read.

        The readers of bzip2 and of Parquet raise `OSError` for damage, as pyarrow does for a network that fails.
        """
        if error.errno is not None:
            return False
        try:
            with self.source.files.open_input_stream(path, compression=None) as stream:
                while stream.read(1 << 20):
                    pass
        except OSError:
            return False
        return True

    def _file(self, path: str) -> bytes:
        if self.source.is_local:
            with open(path, "rb") as stream:  # noqa: PTH123 - millions of small files: a Path costs as much as the open
                return stream.read(self.max_bytes + 1)
        with self.source.files.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read(self.max_bytes + 1))

    def _decoded(self, content: bytes) -> bytes | Refusal:
        """Decode an image as the service does."""
        try:
            if len(content) > self.max_bytes:
                raise BodyTooLarge(f"the image has more than {self.max_bytes} bytes")
            return prepared_pixels(content, self.preparation, self.max_pixels)
        except Problem as problem:
            return Refusal.of(problem)

    # Archives

    def _archive(
        self, piece: Piece, wanted: Callable[[list[str]], list[bool]]
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        place = 0
        for name, read in self._members(piece):
            if kind_of(name) != "image" or any(is_hidden(part) for part in name.split("/")):
                continue
            id = f"{piece.name}#{place}/{printable(name)}"
            place += 1
            if wanted([id])[0]:
                content = read()
                yield id, content if isinstance(content, Refusal) else self._decoded(content)

    def _members(self, piece: Piece) -> Iterator[tuple[str, Callable[[], bytes | Refusal]]]:
        """Yield the name of each member, and what reads it. Other errors of the archive's format become `TarError`."""
        try:
            yield from self._tar(piece) if piece.kind == "tar" else self._zip(piece)
        # Sparse headers, names that are not UTF-8, later versions, and headers of gzip that are cut short.
        except (ValueError, NotImplementedError, TypeError) as error:
            raise tarfile.TarError(str(error)) from error

    def _tar(self, piece: Piece) -> Iterator[tuple[str, Callable[[], bytes | Refusal]]]:
        with (
            self.source.files.open_input_stream(piece.path, compression=None) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_TarMember) as archive,
        ):
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every member in memory
                if member.islnk() or member.issym():  # a stream of members cannot be read again
                    yield member.name, lambda: Refusal(UNREADABLE, "the member is a link: extract the archive")
                    continue
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, lambda content=content: content.read(self.max_bytes + 1)  # type: ignore[misc]

    def _zip(self, piece: Piece) -> Iterator[tuple[str, Callable[[], bytes | Refusal]]]:
        with self.source.files.open_input_file(piece.path) as stream, zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    yield member.filename, lambda member=member: self._member(piece, archive, member)  # type: ignore[misc]

    def _member(self, piece: Piece, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | Refusal:
        try:
            with archive.open(member) as stream:
                return stream.read(self.max_bytes + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, lzma.LZMAError, ValueError) as error:  # names are not UTF-8
            return Refusal(MALFORMED, f"the member of the archive is damaged: {error}")
        except OSError as error:
            if not self._can_be_read(error, piece.path):
                raise
            return Refusal(MALFORMED, f"the member of the archive is damaged: {error}")
        except (RuntimeError, NotImplementedError) as error:  # what zipfile raises without a password or a method
            return Refusal(MALFORMED, f"the member of the archive is encrypted or has an unknown compression: {error}")

    # Arrays

    def _array(self, piece: Piece, wanted: Callable[[list[str]], list[bool]]) -> Iterator[Any]:
        compressed = piece.name.lower().endswith(".gz")
        files = self.source.files
        with files.open_input_file(piece.path) as file:
            # pyarrow's own decompression raises the same error for a damaged file and for a failed disk.
            stream: Any = gzip.GzipFile(fileobj=file, mode="rb") if compressed else file
            start = _read(stream, arrays.LONGEST_START)
            count, offset = arrays.header(piece.kind, start)
            stop = count if piece.stop is None else piece.stop
            if compressed:
                rest = start[offset:]
            else:
                rest = b""
                stream.seek(offset + piece.start * PIXELS)
            for first in range(piece.start, stop, BLOCK):
                size = min(BLOCK, stop - first)
                ids = [f"{piece.name}#{place}" for place in range(first, first + size)]
                asked = wanted(ids)
                if not compressed and not any(asked):
                    stream.seek(offset + (first + size) * PIXELS)
                    continue
                content = rest + _read(stream, size * PIXELS - len(rest)) if size * PIXELS > len(rest) else rest
                content, rest = content[: size * PIXELS], content[size * PIXELS :]
                complete = len(content) // PIXELS
                pixels = np.frombuffer(content, np.uint8)[: complete * PIXELS]
                yield from _chosen(ids[:complete], pixels, asked[:complete])
                if complete < size:
                    raise MalformedArray(f"the file has fewer bytes than the {count} images that its header declares")
            if stop == count and (rest or _end(stream)):
                raise MalformedArray(f"the file has more bytes than the {count} images that its header declares")

    # Parquet

    def _parquet(self, piece: Piece, wanted: Callable[[list[str]], list[bool]]) -> Iterator[Any]:
        with self.source.files.open_input_file(piece.path) as stream:
            table = pq.ParquetFile(stream, pre_buffer=False)
            groups = range(table.num_row_groups) if piece.stop is None else range(piece.start, piece.stop)
            place = piece.first
            for batch in table.iter_batches(BLOCK, row_groups=list(groups), columns=[self.column]):
                ids = [f"{piece.name}#{row}" for row in range(place, place + len(batch))]
                place += len(batch)
                asked = wanted(ids)
                if any(asked):
                    yield from self._column(ids, batch.column(0), asked)

    def _column(self, ids: list[str], column: Any, asked: list[bool]) -> Iterator[Any]:
        """Yield the images of a column: encoded images, or raw pixels."""
        kind = column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            column = column.field("bytes")
            kind = column.type
        if pa.types.is_fixed_size_binary(kind) and kind.byte_width == PIXELS:
            if not column.null_count:
                start = column.offset * PIXELS
                raw = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * PIXELS]
                yield from _chosen(ids, raw, asked)
                return
            yield from _pairs(ids, column.to_pylist(), asked, bytes)
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            yield from _pairs(ids, column, asked, lambda value: self._decoded(value.as_py()))
        else:
            yield from _pairs(ids, column, asked, _numbers)


def _pairs(
    ids: list[str], values: Iterable[Any], asked: list[bool], decode: Callable[[Any], bytes | Refusal]
) -> Iterator[tuple[str, bytes | Refusal]]:
    for id, value, wanted in zip(ids, values, asked, strict=True):
        if wanted:
            absent = value is None or (isinstance(value, pa.Scalar) and not value.is_valid)
            yield id, Refusal.of(EmptyBody("the column is null in this row")) if absent else decode(value)


def _numbers(value: Any) -> bytes | Refusal:
    """Return the pixels of a list of numbers, nested or not."""
    inner = value.type
    while pa.types.is_list(inner) or pa.types.is_large_list(inner) or pa.types.is_fixed_size_list(inner):
        inner = inner.value_type
    if inner != pa.uint8():
        return Refusal.of(WrongArray(f"the column has the type {value.type}; it must be binary, or a list of uint8"))
    try:
        pixels = np.asarray(value.as_py(), np.uint8)
    except (TypeError, ValueError):
        return Refusal.of(WrongArray("the rows of the image have different lengths or nulls"))
    if pixels.size != PIXELS or pixels.shape not in ((PIXELS,), (28, 28), (1, 28, 28), (28, 28, 1)):
        return Refusal.of(WrongArray(f"the array has the shape {list(pixels.shape)}"))
    return pixels.tobytes()


def _chosen(ids: list[str], pixels: Any, asked: list[bool]) -> Iterator[Any]:
    """Yield the requested images of an array, as one block."""
    if all(asked):
        if ids:
            yield block(ids, pixels)
        return
    kept = np.flatnonzero(asked)
    if kept.size:
        yield block([ids[place] for place in kept], np.ascontiguousarray(pixels.reshape(-1, PIXELS)[kept]).reshape(-1))


def _read(stream: Any, size: int) -> bytes:
    """Read up to `size` bytes. A damaged gzip stream ends early."""
    parts = []
    with suppress(*_DAMAGED_GZIP):
        while size > 0 and (part := stream.read1(size)):
            parts.append(part)
            size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _end(stream: Any) -> bytes:
    """Read one byte after the last image: none, unless the file is too long. A gzip stream ends with its checksum.

    Raises:
        MalformedArray: the gzip stream is damaged. Images that were read before may be wrong.
    """
    try:
        return bytes(stream.read1(1))
    except _DAMAGED_GZIP as error:
        raise MalformedArray(f"the end of the gzip file is not valid ({error}), so its images may be wrong") from error
