"""What the service answers, as frozen objects. Unknown members are kept in `document`, so a newer service works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Fitted:
    """What `fit="mnist"` did to an image before it was scored.

    Attributes:
        inverted: the image was dark on bright, and was turned round.
        crop: left, top, right, bottom of the strokes in the image that was sent, in pixels, right and bottom outside.
    """

    inverted: bool
    crop: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict on one image.

    Attributes:
        id: names the kept reconstruction; None when the service could not keep it.
        model, version: what scored.
        mse: mean squared reconstruction error, in the model's standardised space.
        threshold: anomalous means strictly above this.
        alpha: the wanted false-alarm rate behind the threshold.
        p_value: (1 + calibration scores at least as high) / (n + 1).
        is_anomaly: the verdict.
        reason: the guard that decided, when one did: `empty`, for example.
        fitted: with `fit="mnist"`, what was done to the image; else None.
        document: the reply as it came, members that this client does not know included.
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
        name: as requests name it.
        current: the version that answers; None when none could be loaded.
        versions: all that are in the model store.
        is_default: whether it answers when a request names no model.
        normal_class: what it learned, in words.
        threshold, alpha: of the current version.
        problem: why the version that should answer does not, or None.
        document: the entry as it came.
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


def score_of(document: Mapping[str, Any]) -> Score:
    """Read a score. KeyError, TypeError, ValueError: it is not one."""
    return Score(
        id=_words(document["id"]),
        model=str(document["model"]),
        version=int(document["version"]),
        mse=float(document["mse"]),
        threshold=float(document["threshold"]),
        alpha=float(document["alpha"]),
        p_value=float(document["p_value"]),
        is_anomaly=_truth(document["is_anomaly"]),
        reason=_words(document["reason"]),
        fitted=_fitted_of(document.get("fitted")),
        document=document,
    )


def _truth(value: object) -> bool:
    # "false" would be true.
    if not isinstance(value, bool):
        raise TypeError(f"neither true nor false: {value!r}")
    return value


def _words(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"no text: {value!r}")
    return value


def _fitted_of(document: Mapping[str, Any] | None) -> Fitted | None:
    if document is None:
        return None
    left, top, right, bottom = document["crop"]
    return Fitted(_truth(document["inverted"]), (int(left), int(top), int(right), int(bottom)))


def models_of(document: Mapping[str, Any]) -> tuple[Model, ...]:
    """Read the list of models. KeyError, TypeError, ValueError: it is not one."""
    return tuple(
        Model(
            name=str(entry["name"]),
            current=entry["current"],
            versions=tuple(entry["versions"]),
            is_default=_truth(entry["is_default"]),
            normal_class=_words(entry["normal_class"]),
            threshold=entry["threshold"],
            alpha=entry["alpha"],
            problem=_words(entry["problem"]),
            document=entry,
        )
        for entry in document["models"]
    )
