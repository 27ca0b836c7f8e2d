"""Runs a bulk job in this process: each thread reads, scores and writes units with its own module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from anomaly.bulk.inputs import Listing, Unit
from anomaly.bulk.locations import Location
from anomaly.bulk.outputs import Done, PartWriter, remove_unfinished
from anomaly.bulk.readers import Reader
from anomaly.bulk.scorer import BlockScorer, Job


class _StoppedError(Exception):
    """The run has been interrupted, or has failed in another thread."""


class _Shared:
    """Hands out units one at a time to several threads."""

    def __init__(self, units: Iterator[Unit]) -> None:
        self._units = units
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Unit]:
        return self

    def __next__(self) -> Unit:
        with self._lock:
            return next(self._units)


def run(
    job: Job,
    listing: Listing,
    reader: Reader,
    output: Location,
    *,
    workers: int,
    on_rows: Callable[[int], object],
) -> None:
    """Score all images that have no row yet.

    A run that is interrupted writes the rows that it has scored. A run that is killed loses at most
    `outputs.ROWS_PER_FILE` rows per thread, which the next run scores again.

    Args:
        job: input and version.
        listing, reader: of the input.
        output: folder of the rows.
        workers: number of threads. Python is only needed between forward passes, so that two threads use two cores.
        on_rows: called from any thread with a number of new rows.

    Raises:
        BulkError: the version cannot be used here, or the input contains nothing.
        DamagedRowsError: a file of rows is damaged.
        OSError: a file system failed.
    """
    remove_unfinished(output)
    done = Done(output)
    units, stopped = _Shared(listing.units()), threading.Event()
    loading = threading.Lock()

    def wanted(ids: list[str]) -> list[bool]:
        if stopped.is_set():  # also between images that are skipped because they have a row
            raise _StoppedError
        return done.wanted(ids)

    def work() -> None:
        with loading:  # `warnings.catch_warnings` is not thread-safe
            scorer = BlockScorer(job)
        writer = PartWriter(output, job.schema)
        try:
            for unit in units:
                for table in reader.blocks(unit, wanted):
                    writer.add(scorer(table))
                    on_rows(len(table))
        except _StoppedError:
            pass
        finally:
            writer.flush()

    with ThreadPoolExecutor(workers, "bulk") as pool:
        threads = [pool.submit(work) for _ in range(workers)]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
        for thread in threads:
            thread.result()
