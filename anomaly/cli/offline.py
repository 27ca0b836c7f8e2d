"""Score offline with the code of the service.

Images are scored one at a time, as a service does for a single client: in a micro-batch of several images, rounding may
change a score by a few millionths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import urlencode

import numpy as np

from anomaly import Score, ServiceError
from anomaly.cli.formats import Result
from anomaly.cli.scoring import Verdict
from anomaly.cli.sources import Source
from anomaly.client.errors import problem
from anomaly.client.images import read
from anomaly.client.replies import score_of
from app import problems
from app.http.queries import parse_query
from app.http.schemas import ScoreQuery
from app.images import png
from app.images.prepare import choose, prepare
from app.inference.detector import Detector, DetectorError
from app.inference.device import DeviceError, choose_device, use_one_thread
from app.models.provenance import Provenance, ProvenanceConfigurationError
from app.models.repository import Artifact, Repository, RepositoryError
from app.scoring.verdict import DecisionRule, Fitted
from app.settings import SettingsError, from_environment


class OfflineError(ServiceError):
    """The settings, the device or the version does not allow scoring; a service would not start either."""


class Offline:
    """Scores with a model version on this machine.

    ANOMALY_DEFAULT_MODEL, ANOMALY_DEVICE and the rules about the origin of versions (ANOMALY_MODEL_SIGNATURE and
    others) have the same effect as for a service.

    Args:
        model_store: folder of the model versions.
        verdict: parameters of the verdicts.

    Attributes:
        fit: how images are prepared.

    Raises:
        ServiceError: the version does not exist, is rejected, or its calibration does not support `alpha`.
    """

    def __init__(self, model_store: Path, verdict: Verdict) -> None:
        use_one_thread()
        try:
            settings = from_environment()
            query = _query(verdict)
            provenance = Provenance(
                settings.model_signature, settings.model_public_key_file, settings.model_digests_file
            )
            artifact = _open(Repository(model_store, provenance), query.model or settings.default_model)
            self._detector = Detector.load(artifact, choose_device(settings.device))
        except (SettingsError, DeviceError, RepositoryError, DetectorError, ProvenanceConfigurationError) as error:
            raise OfflineError(str(error)) from error
        self._rule = _rule(artifact, query.alpha)
        try:
            self._preparation = choose(query.fit, artifact.manifest)
        except problems.InvalidParameter as refused:
            _refuse(refused)
        self.fit: str = self._preparation.fit
        self._source: Literal["request", "model"] = "model" if query.fit is None else "request"
        self._fit_pixels = settings.fit_max_pixels

    def results(self, sources: Iterable[Source]) -> Iterator[Result]:
        """Yield the result of each image, in order."""
        for source in sources:
            try:
                yield Result(source.name, self.score(read(source.image)))
            except problems.Problem as refused:
                yield Result(source.name, problem(refused.status, refused.document()))
            except ServiceError as error:
                yield Result(source.name, error)

    def calibration_size(self, model: str, version: int) -> int:  # noqa: ARG002
        """Return the number of calibration scores of the version."""
        return len(self._rule.calibration.scores)

    def close(self) -> None:
        """Do nothing. Offline scoring opens no connections."""

    def score(self, content: bytes) -> Score:
        """Score one image file.

        Raises:
            app.problems.Problem: the service would reject the image too.
        """
        if self._preparation.fit == "strict":
            pixels, how = png.decode(content), None
        else:
            fitted = prepare(content, self._preparation, self._fit_pixels)
            pixels, how = fitted.pixels, Fitted.of(fitted, self._preparation.fit, self._source)
        shape = (1, 1, png.SIDE, png.SIDE)
        image = np.frombuffer(bytearray(pixels), np.uint8).reshape(shape)
        found = self._detector.detect(image)
        mse, code = float(found.mse[0]), int(found.reason[0])
        if not math.isfinite(mse):
            raise problems.InternalError("the score is not a finite number")
        if self._rule.is_near(mse):
            mse = self._detector.score_alone(image)
        [verdict] = self._rule.verdicts([mse], [(None, *self._rule.manifest.reasons)[code]])
        return score_of(self._rule.document(verdict, id=None, fitted=how))


def _query(verdict: Verdict) -> ScoreQuery:
    """Validate the parameters as the service does."""
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


def _rule(artifact: Artifact, alpha: float | None) -> DecisionRule:
    try:
        return DecisionRule.for_alpha(artifact.manifest, artifact.calibration, alpha)
    except problems.UnsupportedAlpha as refused:
        _refuse(refused)


def _refuse(refused: problems.Problem) -> NoReturn:
    raise problem(refused.status, refused.document())
