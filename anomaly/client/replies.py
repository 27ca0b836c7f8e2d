"""The service's replies as frozen objects. `document` also contains members without an attribute in this client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anomaly.client.errors import Problem, problem


@dataclass(frozen=True, slots=True)
class Fitted:
    """The changes that were made to an image before it was scored.

    Attributes:
        inverted: whether dark strokes on a bright background were inverted.
        crop: left, top, right and bottom of the part that was scored, in pixels of the upright image; right and bottom
            are exclusive.
        fit: `mnist` or `resize`.
        source: `request` or `model`: who chose `fit`. None if the service does not return it.
    """

    inverted: bool
    crop: tuple[int, int, int, int]
    fit: str = "mnist"
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict on one image.

    Attributes:
        id: id of the stored reconstruction; None if it was not stored.
        model: name of the model.
        version: version of the model.
        mse: mean squared reconstruction error, in the model's standardised space.
        threshold: an `mse` strictly above it is anomalous.
        alpha: false-positive rate that the threshold was calibrated for.
        p_value: (1 + number of calibration scores >= `mse`) / (n + 1).
        is_anomaly: the verdict.
        reason: guard that decided the verdict, `empty` for example; None if the threshold decided.
        fitted: the changes to the image; None if it was scored as it is.
        document: the whole reply.
    """

    id: str | None
    model: str
    version: int
    mse: float
    threshold: float
    alpha: float
    p_value: float
    is_anomaly: bool
    reason: str | None
    fitted: Fitted | None
    document: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the service.

    Attributes:
        name: name in requests.
        current: version that the service uses; None if none could be loaded.
        versions: all versions in the model store.
        is_default: whether requests that name no model use it.
        normal_class: description of the normal class.
        threshold: threshold of the current version.
        alpha: false-positive rate of the current version.
        fit: how the service prepares an image of the current version if a request does not say.
        problem: why the service does not use the version that the model store marks as current; None if it does.
        document: the whole entry.
    """

    name: str
    current: int | None
    versions: tuple[int, ...]
    is_default: bool
    normal_class: str | None
    threshold: float | None
    alpha: float | None
    problem: str | None
    document: Mapping[str, Any] = field(repr=False, compare=False)
    fit: str | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The calibration of a model version.

    Attributes:
        model: name of the model.
        version: version of the model.
        normal_class: description of the normal class.
        n: number of normal images in the calibration.
        alpha: false-positive rate of the version.
        threshold: threshold of the version.
        edges: edges of the histogram's bins.
        counts: number of calibration scores per bin.
        operating_points: pairs of a false-positive rate and its threshold, by ascending rate.
        document: the whole reply.
    """

    model: str
    version: int
    normal_class: str
    n: int
    alpha: float
    threshold: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    operating_points: tuple[tuple[float, float], ...]
    document: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Validity:
    """Whether images still score like the calibration images of a model version.

    Attributes:
        model: name of the model.
        version: version of the model.
        status: `valid`, `watch` or `changed`.
        reason: why the status is not `valid`, else None.
        images: number of compared images.
        p_value: probability of at least this evidence at any time, if nothing has changed.
        evidence_log10: base-10 logarithm of the evidence now.
        anomalous_share: share of images called anomalous; None before the first image.
        anomalous_interval: bounds of that share, valid at all times at once with probability 0.95.
        alpha: false-positive rate of the version.
        document: the whole reply.
    """

    model: str
    version: int
    status: str
    reason: str | None
    images: int
    p_value: float
    evidence_log10: float
    anomalous_share: float | None
    anomalous_interval: tuple[float, float]
    alpha: float
    document: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the service can score; true in a condition if it can.

    Attributes:
        ready: whether it can score.
        problems: what is missing.
        document: the whole reply.
    """

    ready: bool
    problems: tuple[str, ...]
    document: Mapping[str, Any] = field(repr=False, compare=False)

    def __bool__(self) -> bool:
        return self.ready


# Each function below raises KeyError, TypeError or ValueError if the document is not the reply that it reads.


def score_of(document: Mapping[str, Any]) -> Score:
    """Read a score."""
    return Score(
        id=_text(document["id"]),
        model=str(document["model"]),
        version=int(document["version"]),
        mse=float(document["mse"]),
        threshold=float(document["threshold"]),
        alpha=float(document["alpha"]),
        p_value=float(document["p_value"]),
        is_anomaly=_bool(document["is_anomaly"]),
        reason=_text(document["reason"]),
        fitted=_fitted_of(document.get("fitted")),
        document=document,
    )


def batch_of(document: Mapping[str, Any]) -> list[Score | Problem]:
    """Read the reply to a batch request: one score or problem per image, in the order of the request."""
    shared = {"id": None, "reconstruction": None}
    shared |= {name: document[name] for name in ("model", "version", "threshold", "alpha")}
    results: list[Score | Problem] = []
    for place, item in enumerate(document["items"]):
        if item["index"] != place:
            raise ValueError("an image is missing")
        if (refusal := item.get("problem")) is not None:
            results.append(problem(int(refusal["status"]), refusal))
        else:
            results.append(score_of({**shared, **{name: value for name, value in item.items() if name != "index"}}))
    return results


def models_of(document: Mapping[str, Any]) -> tuple[Model, ...]:
    """Read the list of models."""
    return tuple(
        Model(
            name=str(entry["name"]),
            current=entry["current"],
            versions=tuple(entry["versions"]),
            is_default=_bool(entry["is_default"]),
            normal_class=_text(entry["normal_class"]),
            threshold=entry["threshold"],
            alpha=entry["alpha"],
            problem=_text(entry["problem"]),
            document=entry,
            fit=_text(entry.get("fit")),
        )
        for entry in document["models"]
    )


def version_of(document: Mapping[str, Any]) -> str:
    """Read the version of a manifest."""
    return str(int(document["version"]))


def validity_of(document: Mapping[str, Any]) -> Validity:
    """Read the validity of a version."""
    anomalous = document["anomalous"]
    share = anomalous["share"]
    return Validity(
        model=str(document["model"]),
        version=int(document["version"]),
        status=str(document["status"]),
        reason=_text(document["reason"]),
        images=int(document["images"]),
        p_value=float(document["p_value"]),
        evidence_log10=float(document["evidence_log10"]),
        anomalous_share=None if share is None else float(share),
        anomalous_interval=(float(anomalous["low"]), float(anomalous["high"])),
        alpha=float(anomalous["alpha"]),
        document=document,
    )


def calibration_of(document: Mapping[str, Any]) -> Calibration:
    """Read the calibration of a version."""
    histogram = document["histogram"]
    return Calibration(
        model=str(document["model"]),
        version=int(document["version"]),
        normal_class=str(document["normal_class"]),
        n=int(document["n"]),
        alpha=float(document["alpha"]),
        threshold=float(document["threshold"]),
        edges=tuple(float(edge) for edge in histogram["edges"]),
        counts=tuple(int(count) for count in histogram["counts"]),
        operating_points=tuple(
            (float(point["alpha"]), float(point["threshold"])) for point in document["operating_points"]
        ),
        document=document,
    )


def readiness_of(document: Mapping[str, Any]) -> Readiness:
    """Read the readiness report."""
    return Readiness(_bool(document["ready"]), tuple(str(each) for each in document["problems"]), document)


def _bool(value: object) -> bool:
    # bool("false") is true.
    if not isinstance(value, bool):
        raise TypeError(f"not a boolean: {value!r}")
    return value


def _text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"not a text: {value!r}")
    return value


def _fitted_of(document: Mapping[str, Any] | None) -> Fitted | None:
    if document is None:
        return None
    left, top, right, bottom = document["crop"]
    crop = (int(left), int(top), int(right), int(bottom))
    source = _text(document.get("source"))
    return Fitted(_bool(document["inverted"]), crop, str(document.get("fit", "mnist")), source)
