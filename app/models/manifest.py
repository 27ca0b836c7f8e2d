"""The manifest of a model version: the contract between training and the service, schema version 1."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ModelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Reason = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


LOCAL = "local"
"""The reason of images whose score is the local signal instead of the mean error. Unlike the images that a guard
rejects, such an image can be normal, and its verdict then has no reason."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Recipe(_Frozen):
    """The recipe of the autoencoder: sufficient to train it again."""

    name: str
    parameters: dict[str, Any]
    seed: int


class Data(_Frozen):
    """The data for training and evaluation."""

    name: str
    source: str
    """Source of the images: a folder, the OpenML download, or the sample of a package."""
    sha256: Sha256
    """SHA-256 of the raw pixels and labels, in the order of the data set."""
    normal: tuple[int, ...]
    """The labels of the normal class."""
    train: int
    calibration: int
    test_normal: int
    test_anomalous: int


class Preparation(_Frozen):
    """How an image file becomes the pixels that the model scores: the default of requests to the version."""

    fit: Literal["strict", "mnist", "resize"] = "strict"
    """`strict`: a PNG of the model's size, unchanged. `mnist`: see docs/fit.md. `resize`: the whole picture or a crop
    of it as grey levels, resized."""
    invert: bool = False
    """Only for `resize`: whether bright becomes dark."""
    crop: tuple[float, float, float, float] | None = None
    """Only for `resize`: left, top, right and bottom as shares of the upright picture's sides, 0 to 1. None: all."""


STRICT = Preparation()
"""Images are scored unchanged."""


class Recalibration(_Frozen):
    """A new threshold for an existing model. All other members of the manifest are those of `version`."""

    version: int = Field(ge=1)
    """The version of the same model whose `model.pt` this is, byte for byte."""
    source: str
    """Description of the images, without paths."""
    sha256: Sha256 | None
    """SHA-256 of the raw pixels of the images, in order. None: the calibration images of `version`."""


class CalibrationSummary(_Frozen):
    """The source of the threshold. The scores are in calibration.npy."""

    n: int = Field(ge=1)
    rank: int = Field(ge=1)
    confidence: float | None
    """None: the guarantee is on average over calibration draws."""
    band_level: float
    band: tuple[float, float]
    """Interval of the false-positive rate on new normal images, with probability `band_level` (Beta distribution)."""
    recalibrated: Recalibration | None = None
    """None: training chose the threshold."""


class Manifest(_Frozen):
    """The metadata of a model version."""

    schema_version: Literal[1] = 1
    name: ModelName
    version: int = Field(ge=1)
    created_at: datetime
    normal_class: str
    """Description for readers: "the digit 0"."""
    recipe: Recipe
    input_shape: tuple[int, int, int]
    """Channels, height, width of the raw uint8 input."""
    preparation: Preparation = STRICT
    """How the training images became raw input. Versions without this member were trained with `strict`."""
    score_space: str
    """Description of the space in which the squared errors are computed."""
    alpha: float = Field(gt=0, lt=1)
    threshold: float = Field(gt=0)
    reasons: tuple[Reason, ...]
    """Names of the guards in the graph, and `LOCAL`: code k is `reasons[k - 1]`; 0 means that none decided."""
    calibration: CalibrationSummary
    metrics: dict[str, Any]
    data: Data
    code_version: str
    torch_version: str
    device: str
    """Where training ran."""
    warnings: tuple[str, ...] = ()
    """Reasons to distrust the metrics or the threshold, such as too few images."""
    files: dict[str, Sha256]
    """SHA-256 of every other file of the version, by its path relative to the version's folder."""
