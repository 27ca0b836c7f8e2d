"""Builds the verdict on an image, for single scores, batches, stored records, offline and bulk scoring alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from app.images.fit import Fitted as Prepared
from app.models.calibration import Calibration, CalibrationError
from app.models.manifest import LOCAL, Manifest
from app.problems import UnsupportedAlpha

NEAR = 1e-5
"""Relative distance from the threshold within which an image is scored again, alone.

The score of an image depends on the other images of its forward pass in the last digits: up to 2.4e-7 for
`zero-article`, 0 for `zero` on a CPU. Within this distance, the score of the image alone decides, so that an image has
one verdict on one machine."""


class Ignored(BaseModel):
    """The parts of the image that `fit=mnist` left out: specks, printed lines, frames, a table."""

    model_config = ConfigDict(frozen=True)

    components: int = Field(description="Number of connected components and printed lines that were left out")
    ink: float = Field(description="Share of all ink that was left out, 0 to 1")


class Fitted(BaseModel):
    """The changes to the image before it was scored."""

    model_config = ConfigDict(frozen=True)

    fit: Literal["mnist", "resize"] = Field(description="How the image was prepared")
    source: Literal["request", "model"] = Field(
        description="Who chose `fit`: the request, or the version, which was trained on images prepared in this way"
    )
    inverted: bool = Field(description="Whether the image was dark on bright and has been inverted")
    crop: tuple[int, int, int, int] = Field(
        description="Left, top, right, bottom of the part that was scored, in pixels of the upright image"
    )
    ignored: Ignored | None = Field(None, description="Parts of the image that were left out, only with `mnist`")

    @classmethod
    def of(cls, found: Prepared, how: Literal["mnist", "resize"], source: Literal["request", "model"]) -> Fitted:
        """Return the description of a prepared image."""
        ignored = found.ignored and Ignored(components=found.ignored.components, ink=found.ignored.ink)
        return cls(fit=how, source=source, inverted=found.inverted, crop=found.crop, ignored=ignored)


class Verdict(NamedTuple):
    """The verdict on one image.

    Attributes:
        mse: the anomaly score; finite.
        p_value: (1 + number of calibration scores at least as high) / (n + 1).
        is_anomaly: whether the score is strictly above the threshold.
        reason: the guard that decided, `local` if the image is anomalous by its local signal, or None.
    """

    mse: float
    p_value: float
    is_anomaly: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class DecisionRule:
    """The threshold of one model version for one false-positive rate. Build it with `for_alpha`.

    Attributes:
        manifest, calibration: of the model version.
        threshold: an image is anomalous if its score is strictly above it.
        alpha: the false-positive rate that the threshold was chosen for.
    """

    manifest: Manifest
    calibration: Calibration
    threshold: float
    alpha: float

    @classmethod
    def for_alpha(cls, manifest: Manifest, calibration: Calibration, alpha: float | None = None) -> DecisionRule:
        """Return the rule for a false-positive rate. Default: the version's own rate.

        Raises:
            UnsupportedAlpha: the calibration has too few scores for `alpha`.
        """
        if alpha is None or alpha == manifest.alpha:
            return cls(manifest, calibration, manifest.threshold, manifest.alpha)
        try:
            return cls(manifest, calibration, calibration.threshold(alpha), alpha)
        except CalibrationError as error:
            raise UnsupportedAlpha(str(error)) from None

    def verdict(self, mse: float, p_value: float, reason: str | None) -> Verdict:
        """Return the verdict on an image with the score `mse`."""
        is_anomaly = mse > self.threshold
        return Verdict(mse, p_value, is_anomaly, reason if is_anomaly or reason != LOCAL else None)

    def verdicts(self, mses: Sequence[float], reasons: Sequence[str | None]) -> list[Verdict]:
        """Return the verdicts on N images from their scores."""
        p_values = self.calibration.p_values(mses)
        return [self.verdict(*values) for values in zip(mses, p_values, reasons, strict=True)]

    def is_near(self, mse: float) -> bool:
        """Return whether the other images of the forward pass could decide the verdict."""
        return abs(mse - self.threshold) <= NEAR * self.threshold

    def near(self, mses: NDArray[np.float64]) -> list[int]:
        """Return the places of the scores that `is_near` is true for."""
        return np.flatnonzero(np.abs(mses - self.threshold) <= NEAR * self.threshold).tolist()

    def count_anomalous(self, mses: NDArray[np.float64]) -> int:
        """Return how many of N scores are anomalous. NaN is not."""
        return int(np.count_nonzero(mses > self.threshold))

    def reply(self, verdict: Verdict, id: str | None, prefix: str = "", fitted: Fitted | None = None) -> bytes:
        """Return the JSON reply. Arguments as for `document`."""
        return to_json(self.document(verdict, id, prefix, fitted))

    def document(
        self, verdict: Verdict, id: str | None, prefix: str = "", fitted: Fitted | None = None
    ) -> dict[str, Any]:
        """Return the members of the JSON reply, as `app.http.schemas.ScoreResponse` describes them.

        Args:
            verdict: by this rule.
            id: names the stored reconstruction, if there is one.
            prefix: path prefix of links.
            fitted: the changes to the image with `fit=mnist`, else None.
        """
        document: dict[str, Any] = {
            "id": id,
            "model": self.manifest.name,
            "version": self.manifest.version,
            "mse": verdict.mse,
            "threshold": self.threshold,
            "alpha": self.alpha,
            "p_value": verdict.p_value,
            "is_anomaly": verdict.is_anomaly,
            "reason": verdict.reason,
            "reconstruction": None if id is None else reconstruction_path(prefix, id),
        }
        if fitted is not None:
            document["fitted"] = fitted.model_dump(exclude_none=True)
        return document


def reconstruction_path(prefix: str, id: str) -> str:
    """Return the path of a stored reconstruction."""
    return f"{prefix}/reconstruction/{id}"
