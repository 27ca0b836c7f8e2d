"""The shapes of requests and replies, as OpenAPI shows them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ModelReference = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}(@[1-9][0-9]{0,8})?$")]


class ScoreQuery(BaseModel):
    """The query of `POST /score`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelReference | None = Field(None, description="`name` or `name@version`; default: the default model")
    alpha: float | None = Field(None, gt=0, lt=1, description="Another false-alarm rate for this verdict")
    fit: Literal["strict", "mnist"] = Field(
        "strict",
        description="`strict`: the image must be 28x28, and is scored as it is. `mnist`: any size; cropped, scaled and "
        "centred as MNIST's digits were",
    )
    include: Literal["reconstruction"] | None = Field(None, description="Embed the reconstruction as base64 PNG")


class Ignored(BaseModel):
    """What `fit=mnist` left out: specks, printed lines, frames, a table, whatever is not the digit."""

    model_config = ConfigDict(frozen=True)

    components: int = Field(description="Number of connected components and printed lines that were left out")
    ink: float = Field(description="Share of all ink that was left out, 0 to 1")


class Fitted(BaseModel):
    """What `fit=mnist` did to the image before it was scored."""

    model_config = ConfigDict(frozen=True)

    inverted: bool = Field(description="The image was dark on bright, and was turned round")
    crop: tuple[int, int, int, int] = Field(
        description="Left, top, right, bottom of the strokes in the image that was sent, in pixels"
    )
    ignored: Ignored | None = Field(None, description="What was left out of the image")


class BatchQuery(BaseModel):
    """The query of `POST /score/batch`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelReference | None = Field(None, description="`name` or `name@version`; default: the default model")
    alpha: float | None = Field(None, gt=0, lt=1, description="Another false-alarm rate for these verdicts")
    store: bool = Field(False, description="Keep the reconstructions; each item then has an id")


class ScoreResponse(BaseModel):
    """The reply of `POST /score`."""

    model_config = ConfigDict(frozen=True)

    id: str | None = Field(description="Random id of the kept reconstruction; null when the store failed")
    model: str
    version: int
    mse: float = Field(description="Mean squared reconstruction error in the model's standardised space")
    threshold: float = Field(description="Anomalous means strictly above this")
    alpha: float = Field(description="The wanted false-alarm rate behind the threshold")
    p_value: float = Field(description="(1 + calibration scores at least as high) / (n + 1)")
    is_anomaly: bool
    reason: str | None = Field(description="Which guard decided, when one did: `empty`, for example")
    reconstruction: str | None = Field(description="Where to fetch the reconstruction")
    fitted: Fitted | None = Field(None, description="What was done to the image, with `fit=mnist`; else absent")
    reconstruction_png: str | None = Field(
        None, description="The reconstruction as base64 PNG, with `include=reconstruction`; else absent"
    )


class OperatingPoint(BaseModel):
    """A false-alarm rate and the threshold that keeps it."""

    alpha: float
    threshold: float


class ScoreHistogram(BaseModel):
    """How many scores lie in each of the bins of equal width between neighbouring edges; the last edge is inside."""

    edges: list[float]
    counts: list[int]


class CalibrationView(BaseModel):
    """The reply of `GET /models/{name}/versions/{version}/calibration`."""

    model: str
    version: int
    normal_class: str
    n: int = Field(description="Normal images that the threshold was chosen on")
    alpha: float = Field(description="The version's own false-alarm rate")
    threshold: float
    histogram: ScoreHistogram = Field(description="Of the scores of the calibration images")
    operating_points: list[OperatingPoint] = Field(
        description="Rates that the calibration supports, ascending, each with the threshold that `?alpha=` gives"
    )


class BatchItem(BaseModel):
    """One image of a batch: a result, or a problem and nothing else."""

    index: int = Field(description="Its place in the request, from 0")
    mse: float | None = None
    p_value: float | None = None
    is_anomaly: bool | None = None
    reason: str | None = None
    id: str | None = Field(None, description="With `store=true`; null when the store failed")
    reconstruction: str | None = Field(None, description="With `store=true`: where to fetch the reconstruction")
    problem: ProblemDocument | None = Field(None, description="Why this image has no score")


class BatchResponse(BaseModel):
    """The reply of `POST /score/batch` in JSON; in NDJSON each line is one of its items."""

    model: str
    version: int
    threshold: float
    alpha: float
    count: int
    anomalous: int
    failed: int
    items: list[BatchItem]


class ModelSummary(BaseModel):
    """One model of the model store, as served."""

    name: str
    current: int | None = Field(description="The version that answers; null when none could be loaded")
    versions: list[int]
    is_default: bool
    normal_class: str | None
    threshold: float | None
    alpha: float | None
    problem: str | None = Field(description="Why the current version of the disk is not the one that answers")


class ModelList(BaseModel):
    """The reply of `GET /models`."""

    models: list[ModelSummary]


class Liveness(BaseModel):
    """The reply of `GET /livez`."""

    status: Literal["live"] = "live"


class Readiness(BaseModel):
    """The reply of `GET /readyz`; the status code says the same."""

    ready: bool
    model: str
    version: int | None
    device: str
    store: Literal["up", "down"]
    problems: list[str] = Field(description="What is missing, in words")


class ProblemDocument(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str | None = None
    hint: str | None = None
    instance: str | None = None
