"""The documents that describe the server and its models, as clients of the protocol read them."""

from __future__ import annotations

from typing import Any

from app import __version__
from app.http.inference_protocol.documents import INPUT
from app.http.inference_protocol.outputs import OUTPUTS

_PLATFORM = "pytorch_torchscript"


def server() -> dict[str, Any]:
    """Return the metadata of the server."""
    return {
        "name": "reconstruction-anomaly",
        "version": __version__,
        "extensions": ["binary_tensor_data", "model_configuration"],
    }


def model(name: str, versions: list[int]) -> dict[str, Any]:
    """Return the metadata of a model with these versions in the model store; -1 stands for the number of images."""
    outputs = [{"name": key, "datatype": each.datatype, "shape": [-1, *each.shape]} for key, each in OUTPUTS.items()]
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": _PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, 1, 28, 28]}],
        "outputs": outputs,
    }


def config(name: str, max_batch_size: int) -> dict[str, Any]:
    """Return the configuration of a model in the form of Triton, as perf_analyzer reads it."""
    outputs = [
        {"name": key, "data_type": _triton_type(each.datatype), "dims": list(each.shape)}
        for key, each in OUTPUTS.items()
    ]
    return {
        "name": name,
        "platform": _PLATFORM,
        "max_batch_size": max_batch_size,
        "input": [{"name": INPUT, "data_type": "TYPE_UINT8", "dims": [1, 28, 28]}],
        "output": outputs,
        "dynamic_batching": {},
    }


def _triton_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
