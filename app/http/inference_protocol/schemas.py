"""The JSON documents of the protocol's routes, as OpenAPI shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Document(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ErrorDocument(_Document):
    """An error of a route of the protocol."""

    error: str = Field(
        description="The problem in words: title, detail and hint", examples=["The path does not exist."]
    )


class Live(_Document):
    """The reply of `GET /v2/health/live`."""

    live: Literal[True] = True


class Ready(_Document):
    """The reply of `GET /v2/health/ready`."""

    ready: bool


class ServerMetadata(_Document):
    """The reply of `GET /v2`."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(_Document):
    """An input or output of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 is the number of images")


class ModelMetadata(_Document):
    """The reply of `GET /v2/models/{name}`."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class TensorConfiguration(_Document):
    """An input or output in the configuration of a model."""

    name: str
    data_type: str
    dims: list[int] = Field(description="Shape of one image")


class ModelConfiguration(_Document):
    """The reply of `GET /v2/models/{name}/config`."""

    name: str
    platform: str
    max_batch_size: int = Field(description="Maximum number of images of a request, by the size of its body")
    input: list[TensorConfiguration]
    output: list[TensorConfiguration]
    dynamic_batching: dict[str, int] = Field(description="Empty: requests are batched without a delay")


class ModelReady(_Document):
    """The reply of the routes for the readiness of a model."""

    name: str
    ready: bool


class ModelNames(_Document):
    """The reply of `GET /v1/models`."""

    models: list[str]


class TensorParameters(_Document):
    """The parameters of an output in a reply."""

    binary_data_size: int = Field(description="Number of bytes of the tensor after the JSON")


class OutputTensor(_Document):
    """An output of an inference request, with `data`, or with `parameters` if it follows the JSON as binary data."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float | bool | str] | None = None
    parameters: TensorParameters | None = None


class InferResponse(_Document):
    """The reply of `POST /v2/models/{name}/infer`."""

    model_name: str
    model_version: str
    id: str | None = Field(None, description="The id of the request, if it has one")
    outputs: list[OutputTensor]


class Prediction(_Document):
    """The verdict on one image."""

    mse: float
    p_value: float
    is_anomaly: bool
    reason: str | None


class PredictResponse(_Document):
    """The reply of `POST /v1/models/{name}:predict`."""

    model_name: str
    model_version: str
    predictions: list[Prediction]


_FLAG = {"type": ["boolean", "null"]}
_PARAMETERS = {
    "type": "object",
    "properties": {
        "alpha": {"type": ["number", "null"], "description": "False-positive rate of the verdicts"},
        "fit": {
            "type": ["string", "null"],
            "enum": ["strict", "mnist", "resize", None],
            "description": "As for POST /score; encoded images only",
        },
    },
}
INFER_BODY: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"]},
            "parameters": {
                **_PARAMETERS,
                "properties": {**_PARAMETERS["properties"], "binary_data_output": _FLAG},  # type: ignore[dict-item]
            },
            "inputs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": {
                    "type": "object",
                    "required": ["name", "shape", "datatype"],
                    "properties": {
                        "name": {"type": "string", "enum": ["images"]},
                        "shape": {"type": "array", "items": {"type": "integer"}},
                        "datatype": {"type": "string", "enum": ["UINT8", "BYTES"]},
                        "data": {"type": ["array", "null"], "items": {}},
                        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
                    },
                },
            },
            "outputs": {
                "type": ["array", "null"],
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {
                            "type": "string",
                            "enum": ["mse", "is_anomaly", "p_value", "reason", "reconstruction", "error_map"],
                        },
                        "parameters": {"type": "object", "properties": {"binary_data": _FLAG}},
                    },
                },
            },
        },
    },
    "example": {"inputs": [{"name": "images", "shape": [1, 28, 28], "datatype": "UINT8", "data": [0] * 784}]},
}
PREDICT_BODY: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["instances"],
        "properties": {
            "instances": {"type": "array", "minItems": 1, "items": {}},
            "parameters": _PARAMETERS,
        },
    },
    "example": {"instances": [[[0] * 28] * 28]},
}
