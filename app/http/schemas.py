"""Defines the parameters and the JSON documents of the routes, as OpenAPI shows them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.images.prepare import Fit
from app.models.repository import is_version
from app.scoring.verdict import Fitted


def _check_digits(given: object) -> object:
    # Pydantic would accept "01", "+1" and "1.0" as 1, so that one version had many addresses.
    if isinstance(given, str) and not is_version(given):
        raise ValueError("must be a version number, such as 1")
    return given


VersionNumber = Annotated[int, Field(ge=1, le=999_999_999), BeforeValidator(_check_digits)]
ModelReference = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}(@[1-9][0-9]{0,8})?$")]


class ScoreQuery(BaseModel):
    """The query of `POST /score`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelReference | None = Field(None, description="`name` or `name@version`; default: the default model")
    alpha: float | None = Field(
        None, gt=0, lt=1, description="False-positive rate for this verdict. Default: the rate of the version"
    )
    fit: Fit | None = Field(
        None,
        description="`strict`: the image must have 28x28 pixels and is scored unchanged. `mnist`: the image may have "
        "any size, and is cropped, scaled and centred like the digits of MNIST. `resize`: the image is resized as the "
        "training images of the version were. Default: what the version was trained with, `strict` for most",
    )
    include: Literal["reconstruction"] | None = Field(None, description="Embed the reconstruction as base64 PNG")


class BatchQuery(BaseModel):
    """The query of `POST /score/batch`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelReference | None = Field(None, description="`name` or `name@version`; default: the default model")
    alpha: float | None = Field(
        None, gt=0, lt=1, description="False-positive rate for these verdicts. Default: the rate of the version"
    )
    fdr: float | None = Field(
        None, ge=1e-9, lt=1, description="Mark the anomalies of the whole batch at this false-discovery rate"
    )
    fit: Literal["strict"] | None = Field(
        None,
        description="`strict`: the files have 28x28 pixels and are scored unchanged. Required for files if the version "
        "was trained with another preparation, which a batch does not do",
    )
    store: bool = Field(False, description="Store the reconstructions; each item then has an id")


class ScoreResponse(BaseModel):
    """The reply of `POST /score`."""

    model_config = ConfigDict(frozen=True)

    id: str | None = Field(description="Random id of the stored reconstruction; null if the store failed")
    model: str
    version: int
    mse: float = Field(description="Mean squared reconstruction error in the model's standardised space")
    threshold: float = Field(description="The image is anomalous if mse is strictly above this value")
    alpha: float = Field(description="False-positive rate of the threshold")
    p_value: float = Field(description="(1 + calibration scores at least as high) / (n + 1)")
    is_anomaly: bool
    reason: str | None = Field(
        description="The guard that decided the verdict, for example `empty`; `local` if the largest local error of a "
        "model with a local signal decided; null if the mean error did"
    )
    reconstruction: str | None = Field(description="Path of the reconstruction; null if the store failed")
    fitted: Fitted | None = Field(None, description="The changes to the image; not with `fit=strict`")
    reconstruction_png: str | None = Field(
        None, description="The reconstruction as base64 PNG, only with `include=reconstruction`"
    )


class OperatingPoint(BaseModel):
    """A false-positive rate and its threshold."""

    alpha: float
    threshold: float


class ScoreHistogram(BaseModel):
    """Number of scores in bins of equal width between consecutive edges. The last bin includes its upper edge."""

    edges: list[float]
    counts: list[int]


class CalibrationView(BaseModel):
    """The reply of `GET /models/{name}/versions/{version}/calibration`."""

    model: str
    version: int
    normal_class: str
    n: int = Field(description="Number of calibration images")
    alpha: float = Field(description="False-positive rate of the version")
    threshold: float
    histogram: ScoreHistogram = Field(description="Histogram of the scores of the calibration images")
    operating_points: list[OperatingPoint] = Field(
        description="Supported false-positive rates, ascending, each with its threshold"
    )


class BatchItem(BaseModel):
    """One image of a batch: a result, or only a problem."""

    index: int = Field(description="Position in the request, from 0")
    mse: float | None = None
    p_value: float | None = None
    is_anomaly: bool | None = None
    reason: str | None = None
    id: str | None = Field(None, description="Only with `store=true`; null if the store failed")
    reconstruction: str | None = Field(None, description="Path of the reconstruction, only with `store=true`")
    q_value: float | None = Field(
        None, description="Smallest false-discovery rate at which the image is a discovery, only with `fdr`"
    )
    discovery: bool | None = Field(None, description="Whether q_value is at most `fdr`, only with `fdr`")
    problem: ProblemDocument | None = Field(None, description="The reason why this image has no score")


class BatchResponse(BaseModel):
    """The reply of `POST /score/batch` in JSON. In NDJSON, each line is one item."""

    model: str
    version: int
    threshold: float
    alpha: float
    count: int
    anomalous: int
    failed: int
    fdr: float | None = Field(None, description="The requested false-discovery rate; like all that follow, with `fdr`")
    discoveries: int | None = Field(None, description="Number of discoveries")
    cutoff: float | None = Field(None, description="Largest p-value of a discovery; null if there is none")
    min_discoveries: int | None = Field(
        None, description="Minimum number of discoveries at this rate, for this calibration and number of images"
    )
    resolution_limited: bool | None = Field(
        None, description="Whether nothing was discovered and `min_discoveries` is above 1"
    )
    items: list[BatchItem]


class ModelSummary(BaseModel):
    """One model of the model store."""

    name: str
    current: int | None = Field(description="Version in use; null if no version could be loaded")
    versions: list[int]
    is_default: bool
    normal_class: str | None
    threshold: float | None
    alpha: float | None
    fit: Fit | None = Field(description="How images are prepared if a request does not set `fit`")
    problem: str | None = Field(description="The reason why the current version of the model store is not in use")


class ModelList(BaseModel):
    """The reply of `GET /models`."""

    models: list[ModelSummary]


class Liveness(BaseModel):
    """The reply of `GET /livez`."""

    status: Literal["live"] = "live"


class ProblemDocument(BaseModel):
    """An error document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str | None = None
    hint: str | None = None
    instance: str | None = None
