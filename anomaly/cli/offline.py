"""Scores without a service, by the service's own code: its decoding, its loader, its model, its calibration.

Images go through the model one at a time, as a service gets them that is asked by one caller: a micro-batch of
several may move a score by a few millionths of itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import numpy as np

from anomaly import Score, ServiceError
from anomaly.cli.files import Source
from anomaly.cli.formats import Result
from anomaly.cli.scorers import Verdict
from anomaly.client.errors import problem
from anomaly.client.replies import score_of
from anomaly.client.images import read
from app import problems
from app.http.schemas import ScoreQuery
from app.images import fit, png
from app.inference.detector import Detector, DetectorError, DeviceError, choose_device, use_one_thread
from app.models.repository import Artifact, Repository, RepositoryError
from app.scoring.score import parse_query, threshold_of
from app.settings import SettingsError, from_environment


class OfflineError(ServiceError):
    """What would keep a service from starting here keeps this from scoring: settings, device, a damaged version."""


class Offline:
    """One model version on this machine.

    What the command line does not say is as in a service that is started here: ANOMALY_DEFAULT_MODEL, ANOMALY_DEVICE.

    Args:
        model_store: the folder of model versions.
        verdict: which version, and how to judge.

    Raises:
        ServiceError: there is no such version, it is refused, or the calibration does not support alpha.
    """

    def __init__(self, model_store: Path, verdict: Verdict) -> None:
        use_one_thread()
        try:
            settings = from_environment()
            query = _query(verdict)
            artifact = _open(Repository(model_store), query.model or settings.default_model)
            self._detector = Detector.load(artifact, choose_device(settings.device))
        except (SettingsError, DeviceError, RepositoryError, DetectorError) as error:
            raise OfflineError(str(error)) from error
        self._manifest, self._calibration = artifact.manifest, artifact.calibration
        self._threshold, self._alpha = _threshold(artifact, query.alpha)
        self._fit, self._fit_pixels = verdict.fit, settings.fit_max_pixels

    def results(self, sources: Iterable[Source]) -> Iterator[Result]:
        """Yield the result of each source, in order."""
        for source in sources:
            try:
                yield Result(source.name, self.score(read(source.image)))
            except problems.Problem as refused:
                yield Result(source.name, problem(refused.status, refused.document()))
            except ServiceError as error:
                yield Result(source.name, error)

    def close(self) -> None:
        """Hold nothing open: there is nothing to close."""

    def score(self, content: bytes) -> Score:
        """Score one PNG.

        Raises:
            Problem: of `app.problems`, as the service would answer it.
        """
        fitted = fit.fit(content, self._fit_pixels) if self._fit == "mnist" else None
        pixels = png.decode(content) if fitted is None else fitted.pixels
        shape = (1, 1, png.SIDE, png.SIDE)
        found = self._detector.detect(np.frombuffer(bytearray(pixels), np.uint8).reshape(shape))
        mse, code = float(found.mse[0]), int(found.reason[0])
        if not math.isfinite(mse):
            raise problems.InternalError("the model gave a score that is not a number")
        document: dict[str, Any] = {
            "id": None,
            "model": self._manifest.name,
            "version": self._manifest.version,
            "mse": mse,
            "threshold": self._threshold,
            "alpha": self._alpha,
            "p_value": self._calibration.p_value(mse),
            "is_anomaly": mse > self._threshold,
            "reason": (None, *self._manifest.reasons)[code],
            "reconstruction": None,
        }
        if fitted is not None:
            document["fitted"] = {"inverted": fitted.inverted, "crop": list(fitted.crop)}
        return score_of(document)


def _query(verdict: Verdict) -> ScoreQuery:
    """Read what was asked for as the service reads it, so that it is refused in the same words."""
    asked = {"model": verdict.model, "alpha": verdict.alpha, "fit": verdict.fit}
    text = urlencode({name: value for name, value in asked.items() if value is not None})
    try:
        query: ScoreQuery = parse_query(ScoreQuery, text.encode())
    except problems.InvalidParameter as refused:
        _refuse(refused)
    return query


def _open(repository: Repository, reference: str) -> Artifact:
    name, _, version = reference.partition("@")
    number = int(version) if version else repository.current(name)
    if number is None or number not in repository.versions(name):
        _refuse(problems.ModelNotFound(f"{repository.root} has no {reference}"))
    return repository.open(name, number)


def _threshold(artifact: Artifact, alpha: float | None) -> tuple[float, float]:
    try:
        return threshold_of(artifact.manifest, artifact.calibration, alpha)
    except problems.UnsupportedAlpha as refused:
        _refuse(refused)


def _refuse(refused: problems.Problem) -> NoReturn:
    raise problem(refused.status, refused.document())
