"""Scores blocks of images with one model version. The same class runs in a thread here and in an actor of Ray."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from anomaly.bulk.locations import BulkError
from anomaly.bulk.rows import ANOMALOUS, NORMAL, NOT_SCORED, pixels_of, result_schema
from app.images.pictures import encode, grey_picture
from app.inference.detector import STEP, Detector, DetectorError
from app.inference.device import DeviceError, choose_device, use_one_thread
from app.models.provenance import Provenance
from app.models.repository import Artifact, Repository, RepositoryError
from app.problems import UnsupportedAlpha
from app.scoring.verdict import DecisionRule

_GPU_STEP = 1024
"""Images per forward pass on a GPU."""


@dataclass(frozen=True)
class Job:
    """The parameters of a run that decide about its rows.

    Attributes:
        artifact: the verified model version.
        digest: SHA-256 of its manifest, which contains the checksums of all other files.
        alpha: false-positive rate, or None for that of the version.
        device: `auto`, `cpu`, `cuda` or `cuda:n`.
        q_values: whether the rows have a q-value.
        reconstructions: whether the rows have the reconstruction.
    """

    artifact: Artifact
    digest: str
    alpha: float | None
    device: str
    q_values: bool = False
    reconstructions: bool = False

    @property
    def rule(self) -> DecisionRule:
        """The threshold and its false-positive rate.

        Raises:
            BulkError: the calibration does not support `alpha`.
        """
        try:
            return DecisionRule.for_alpha(self.artifact.manifest, self.artifact.calibration, self.alpha)
        except UnsupportedAlpha as error:
            raise BulkError(f"{error.detail}; use a larger --alpha") from error

    @property
    def schema(self) -> Any:
        """Columns of the results."""
        return result_schema(q_values=self.q_values, reconstructions=self.reconstructions)


def open_job(model_store: Path, reference: str, provenance: Provenance | None = None, **options: Any) -> Job:
    """Read and verify a version of a model store.

    Args:
        model_store: folder of the model versions.
        reference: `name` or `name@version`.
        provenance: rules about the origin of versions. Default: none.
        options: further attributes of `Job`.

    Raises:
        BulkError: the version does not exist, is damaged, or is rejected by `provenance`.
    """
    repository = Repository(model_store, provenance)
    name, _, wanted = reference.partition("@")
    try:
        version = int(wanted) if wanted else repository.current(name)
        if version is None or version not in repository.versions(name):
            raise BulkError(f"{model_store} has no {reference}; `anomaly list --model-store FOLDER` lists the versions")
        artifact = repository.open(name, version)
        manifest = (model_store / name / str(version) / "manifest.json").read_bytes()
    except ValueError:
        raise BulkError(f"{reference} is neither `name` nor `name@version`") from None
    except (RepositoryError, OSError) as error:
        raise BulkError(str(error)) from error
    return Job(artifact, hashlib.sha256(manifest).hexdigest(), **options)


class BlockScorer:
    """Scores blocks. Build it in the thread that uses it: the number of torch threads is a setting of each thread.

    Args:
        job: the parameters.

    Raises:
        BulkError: the device does not exist, or the version does not reproduce its golden scores on it.
    """

    def __init__(self, job: Job) -> None:
        use_one_thread()
        try:
            device = choose_device(job.device)
            step = STEP if device.type == "cpu" else _GPU_STEP
            self._detector = Detector.load(job.artifact, device, step=step)
        except (DeviceError, DetectorError) as error:
            raise BulkError(str(error)) from error
        self._job = job
        self._rule = job.rule
        self._step = step

    def __call__(self, table: Any) -> Any:
        """Return the results of a block.

        Args:
            table: of the schema `rows.INPUT`.

        Returns:
            A table of the schema `Job.schema`, with one row per image in the same order.
        """
        pixels, count = pixels_of(table), len(table)
        if self._job.reconstructions:
            mse, codes, pictures = self._drawn(pixels)
        else:
            mse, codes = self._detector.score(pixels) if count else (np.zeros(0), np.zeros(0, np.int8))
            pictures = None
        scores = mse.astype(np.float64)
        refused = np.asarray(table.column("error").is_valid())
        scores[refused] = np.nan  # of undefined pixels
        for place in self._rule.near(scores):
            scores[place] = self._detector.score_alone(pixels[place : place + 1])
        broken = ~np.isfinite(scores) & ~refused
        error, detail = table.column("error"), table.column("detail")
        if broken.any():
            error = _filled(error, broken, "internal-error")
            detail = _filled(detail, broken, "the model returned a score that is not finite")
        absent = refused | broken
        names = (None, *self._rule.manifest.reasons)
        verdicts = self._rule.verdicts(scores.tolist(), [names[code] for code in codes.tolist()])
        reasons = [verdict.reason for verdict in verdicts]
        words = [ANOMALOUS if verdict.is_anomaly else NORMAL for verdict in verdicts]
        for place in np.flatnonzero(absent).tolist():
            words[place], reasons[place] = NOT_SCORED, None
        manifest = self._rule.manifest
        columns = {
            "id": table.column("id"),
            "mse": pa.array(scores, mask=absent),
            "p_value": pa.array(np.array([verdict.p_value for verdict in verdicts], np.float64), mask=absent),
            "verdict": pa.array(words, pa.string()),
            "reason": pa.array(reasons, pa.string()),
            "q_value": pa.nulls(count, pa.float64()),
            "model": pa.repeat(manifest.name, count),
            "version": pa.repeat(pa.scalar(manifest.version, pa.int32()), count),
            "digest": pa.repeat(self._job.digest, count),
            "error": error,
            "detail": detail,
        }
        if pictures is not None:
            columns["reconstruction"] = pa.array(pictures, pa.binary(), mask=absent)
        schema = self._job.schema
        return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)

    def _drawn(self, pixels: Any) -> tuple[Any, Any, Any]:
        """Return scores, codes and reconstructions as PNG."""
        scores, codes, pictures = [np.zeros(0, np.float32)], [np.zeros(0, np.int8)], []
        for start in range(0, len(pixels), self._step):
            found = self._detector.draw(np.ascontiguousarray(pixels[start : start + self._step]))
            scores.append(found.mse)
            codes.append(found.reason)
            pictures += [encode(grey_picture(planes[1].tobytes())) for planes in found.planes]
        return np.concatenate(scores), np.concatenate(codes), np.array(pictures, object)


def _filled(column: Any, places: Any, text: str) -> Any:
    values = column.to_pylist()
    for place in np.flatnonzero(places).tolist():
        values[place] = text
    return pa.array(values, pa.string())
