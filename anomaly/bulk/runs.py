"""A bulk run from its parameters to its summary, the same for both engines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomaly.bulk import local, outputs, q_values
from anomaly.bulk.inputs import Listing
from anomaly.bulk.locations import BulkError, Location, locate
from anomaly.bulk.readers import Reader
from anomaly.bulk.rows import ANOMALOUS, NORMAL, NOT_SCORED
from anomaly.bulk.scorer import open_job
from app.images.prepare import Fit, choose
from app.models.provenance import Provenance, ProvenanceConfigurationError
from app.problems import InvalidParameter
from app.settings import SettingsError, from_environment


@dataclass(frozen=True)
class Request:
    """The parameters of `anomaly bulk`.

    Attributes:
        source: path or URL of the input.
        output: path or URL of the folder of the results.
        model_store: folder of the model versions.
        model: `name`, `name@version`, or None for the default model.
        alpha: false-positive rate, or None for that of the version.
        fit: `strict`, `mnist` or `resize`; None for what the version was trained with.
        column: column of the images in Parquet files.
        q_values, reconstructions: whether the rows have these columns.
        workers: number of threads or of actors; None for the number of cores.
        address: address of a Ray cluster; None to score in this process.
    """

    source: str
    output: str
    model_store: Path
    model: str | None = None
    alpha: float | None = None
    fit: Fit | None = None
    column: str = "image"
    q_values: bool = False
    reconstructions: bool = False
    workers: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        normal, anomalous, not_scored: number of rows, with those of the runs that this run resumed.
        new: number of rows of this run.
        seconds: time from the first block to the last one.
        ignored: number of files that are not an input.
    """

    normal: int
    anomalous: int
    not_scored: int
    new: int
    seconds: float
    ignored: int


class _Progress:
    """Counts rows, and notes when the first ones and the last ones arrived."""

    def __init__(self, on_rows: Callable[[int], object]) -> None:
        self.began: float | None = None
        self._on_rows = on_rows

    def add(self, count: int) -> None:
        if self.began is None:
            self.began = time.perf_counter()
        self._on_rows(count)


def execute(request: Request, on_rows: Callable[[int], object] = lambda _: None) -> Summary:
    """Score all images of the input that have no row in the output yet.

    Args:
        request: the parameters.
        on_rows: called from any thread with a number of new rows, if the images are scored in this process.

    Raises:
        BulkError: the run cannot begin or continue.
    """
    try:
        settings = from_environment()
        provenance = Provenance(settings.model_signature, settings.model_public_key_file, settings.model_digests_file)
    except (SettingsError, ProvenanceConfigurationError) as error:
        raise BulkError(str(error)) from error
    job = open_job(
        request.model_store,
        request.model or settings.default_model,
        provenance,
        alpha=request.alpha,
        device=settings.device,
        q_values=request.q_values,
        reconstructions=request.reconstructions,
    )
    source, output = locate(request.source), locate(request.output)
    if output.path == source.path and output.url == source.url:
        raise BulkError("the input and the output are the same folder; choose another folder for the results")
    listing = Listing(source, request.column)
    manifest, rule = job.artifact.manifest, job.rule
    try:
        preparation = choose(request.fit, manifest)
    except InvalidParameter as refused:
        raise BulkError(str(refused)) from refused
    max_bytes = settings.max_body_bytes if preparation.fit == "strict" else settings.fit_max_body_bytes
    reader = Reader(source, request.column, preparation, max_bytes, settings.fit_max_pixels)
    outputs.begin(
        output,
        {
            "format": 2,
            "model": manifest.name,
            "version": manifest.version,
            "digest": job.digest,
            "alpha": rule.alpha,
            "threshold": rule.threshold,
            "input": source.url,
            "fit": preparation.fit,
            "column": request.column,
            "q_values": request.q_values,
            "reconstructions": request.reconstructions,
            "engine": "process" if request.address is None else "ray",
        },
    )
    progress = _Progress(on_rows)
    began = time.perf_counter()
    try:
        with outputs.exclusive(output):
            # On Ray, a killed run leaves files that were being written. Ray replaces them.
            before = sum(outputs.count_rows(output, skip_damaged=request.address is not None).values())
            if request.address is None:
                workers = request.workers or available_cores()
                local.run(job, listing, reader, output, workers=workers, on_rows=progress.add)
            else:
                from anomaly.bulk import cluster  # imports Ray

                cluster.run(job, listing, reader, output, address=request.address, workers=request.workers)
            seconds = time.perf_counter() - (progress.began or began)
            if request.q_values:
                q_values.add(output, len(job.artifact.calibration.scores))
            counts: dict[str, Any] = outputs.count_rows(output)
    except outputs.DamagedRowsError as error:
        raise BulkError(f"{error}; {_remedy(request, output)}") from error
    except OSError as error:
        raise BulkError(f"{error}; run the command again to go on") from error
    return Summary(
        counts.get(NORMAL, 0), counts.get(ANOMALOUS, 0), counts.get(NOT_SCORED, 0),
        sum(counts.values()) - before, seconds, listing.ignored,
    )  # fmt: skip


def _remedy(request: Request, output: Location) -> str:
    """Return what to do if a file of rows is damaged."""
    if request.address is None:
        return "delete this file and run the command again, which scores its images again"
    # The checkpoint contains the ids of the file, so Ray would not score its images again.
    return f"delete {output.url} and {output.url}.checkpoint, and run the command again, which scores all images again"


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
