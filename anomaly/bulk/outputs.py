"""The output folder: the description of the run, the rows that are done, and new files of rows."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from anomaly.bulk.locations import BulkError, Location

RUN = "_run.json"
"""Description of the run. Readers of Parquet folders skip names that begin with `_` or `.`."""
ROWS_PER_FILE = 65_536
_DIGEST = 16


class DamagedRowsError(Exception):
    """A file of rows is damaged. The message contains its path and the reason."""


def begin(output: Location, run: dict[str, Any]) -> bool:
    """Create the output folder with the description of a run, or check that the folder belongs to the same run.

    Returns:
        Whether the run is resumed.

    Raises:
        BulkError: the folder contains rows of another run, or other files.
    """
    try:
        found = output.files.get_file_info(output.path)
        if found.type == fs.FileType.File:
            raise BulkError(f"{output.url} is a file; name a folder for the results")
        content = output.read(RUN) if found.type == fs.FileType.Directory else None
        if content is None:
            if found.type == fs.FileType.Directory and _entries(output):
                raise BulkError(f"{output.url} contains files that are not of a bulk run; choose an empty folder")
            output.files.create_dir(output.path, recursive=True)
            with _beginning(output):
                content = output.read(RUN)  # another run may have begun in the same moment
                if content is None:
                    output.write(RUN, json.dumps(run, indent=2).encode() + b"\n")
                    return False
        before = json.loads(content)
    except OSError as error:
        raise BulkError(f"{output.url} cannot be written: {error}") from error
    except ValueError as error:
        raise BulkError(f"{output.inside(RUN)} is damaged: {error}; choose another folder") from error
    for name, value in run.items():
        if before.get(name) != value:
            raise BulkError(
                f"{output.url} contains rows of a run with {name} {before.get(name)!r}, and this run has {value!r}; "
                "choose another folder"
            )
    return True


@contextmanager
def _beginning(output: Location) -> Iterator[None]:
    """Let one process at a time write the description of a run to a local output folder."""
    if not output.is_local:
        yield
        return
    folder = os.open(output.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextmanager
def exclusive(output: Location) -> Iterator[None]:
    """Hold the lock of a local output folder, so that two runs do not write the same rows.

    Raises:
        BulkError: another run holds it.
    """
    if not output.is_local:
        yield
        return
    with Path(output.inside(RUN)).open("r+b") as stream:  # NFS locks a file exclusively only if it can be written
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BulkError(f"another run writes to {output.url}; wait for its end") from error
        yield


def parts(output: Location) -> list[str]:
    """Return the paths of the Parquet files of rows, sorted."""
    return sorted(path for path in _entries(output) if path.endswith(".parquet"))


def _entries(output: Location) -> list[str]:
    infos = output.files.get_file_info(fs.FileSelector(output.path))
    return [info.path for info in infos if info.is_file and not info.base_name.startswith(("_", "."))]


def remove_unfinished(output: Location) -> None:
    """Delete the files that a killed run did not finish."""
    for info in output.files.get_file_info(fs.FileSelector(output.path)):
        if info.is_file and info.base_name.startswith(".") and info.base_name.endswith(".new"):
            output.files.delete_file(info.path)


@contextmanager
def opened(output: Location, path: str) -> Iterator[Any]:
    """Open a file of rows as `pyarrow.parquet.ParquetFile`.

    Raises:
        DamagedRowsError: the file is damaged.
        OSError: the file system failed.
    """
    try:
        with output.files.open_input_file(path) as stream:
            yield pq.ParquetFile(stream, page_checksum_verification=True)
    except (pa.ArrowInvalid, pa.lib.ArrowIndexError, OSError) as error:
        # pyarrow raises `OSError` without a number for damaged pages, and for networks that fail.
        if isinstance(error, OSError) and (error.errno is not None or not output.is_local):
            raise
        raise DamagedRowsError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error


def count_rows(output: Location, *, skip_damaged: bool = False) -> dict[str, int]:
    """Return the number of rows per verdict.

    Args:
        output: folder of the rows.
        skip_damaged: whether damaged files count as empty.

    Raises:
        DamagedRowsError: a file is damaged.
    """
    counts: Counter[str] = Counter()
    for path in parts(output):
        try:
            counts += _verdicts(output, path)
        except DamagedRowsError:
            if not skip_damaged:
                raise
    return dict(counts)


def _verdicts(output: Location, path: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    with opened(output, path) as rows:
        for batch in rows.iter_batches(columns=["verdict"]):
            for pair in pc.value_counts(batch.column(0)).to_pylist():
                counts[pair["values"]] += pair["counts"]
    return counts


class Done:
    """The ids of the rows that exist, as 16 bytes each.

    Args:
        output: folder of the rows.

    Raises:
        DamagedRowsError: a file is damaged.
    """

    def __init__(self, output: Location) -> None:
        found = bytearray()
        for path in parts(output):
            with opened(output, path) as rows:
                for batch in rows.iter_batches(columns=["id"]):
                    found += b"".join(map(_digest, batch.column(0).to_pylist()))
        self._ids = np.sort(_keys(found))

    def __len__(self) -> int:
        return len(self._ids)

    def wanted(self, ids: list[str]) -> list[bool]:
        """Return for each id whether it has no row."""
        if not len(self._ids):
            return [True] * len(ids)
        keys = _keys(b"".join(map(_digest, ids)))
        places = np.minimum(np.searchsorted(self._ids, keys), len(self._ids) - 1)
        absent: list[bool] = (self._ids[places] != keys).tolist()
        return absent


def _digest(id: str) -> bytes:
    return hashlib.blake2b(id.encode("utf-8", "surrogateescape"), digest_size=_DIGEST).digest()


def _keys(digests: bytes | bytearray) -> Any:
    return np.frombuffer(digests, f"S{_DIGEST}")


class PartWriter:
    """Writes rows into Parquet files that appear completely or not at all.

    Args:
        output: folder of the files.
        schema: of the rows.
    """

    def __init__(self, output: Location, schema: Any) -> None:
        self._output = output
        self._schema = schema
        self._tables: list[Any] = []
        self._count = 0

    def add(self, table: Any) -> None:
        """Add rows, and write a file when `ROWS_PER_FILE` are collected."""
        self._tables.append(table)
        self._count += len(table)
        if self._count >= ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write a file of the collected rows."""
        if not self._count:
            return
        # If writing fails, the rows are not written a second time: the file may exist although the call failed.
        tables, self._tables, self._count = self._tables, [], 0
        name = f"part-{uuid.uuid4().hex}.parquet"
        write_part(self._output, self._output.inside(name), pa.concat_tables(tables))


def write_part(output: Location, path: str, table: Any) -> None:
    """Write a Parquet file under a hidden name, then rename it."""
    hidden = output.inside(f".{path.rpartition('/')[2]}.new")
    with output.files.open_output_stream(hidden) as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    output.files.move(hidden, path)
