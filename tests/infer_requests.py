"""Inference requests of the Open Inference Protocol, as clients build them, and readers of the replies."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np

HEADER = "inference-header-content-length"
DTYPES = {"FP32": "<f4", "FP64": "<f8", "BOOL": "?", "UINT8": "u1"}


def json_request(images: np.ndarray, **members: Any) -> dict[str, Any]:
    """Return a document with the pixels of some images as JSON data."""
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "UINT8", "data": images.ravel().tolist()}
    return {"inputs": [tensor], **members}


def bytes_tensor(elements: list[bytes]) -> bytes:
    """Return a binary tensor of type BYTES."""
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def binary_request(
    tensor: bytes, shape: list[int], datatype: str = "UINT8", **members: Any
) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a request with one binary tensor."""
    head = {"name": "images", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(tensor)}}
    document = json.dumps({"inputs": [head], **members}).encode()
    return document + tensor, {HEADER: str(len(document))}


def outputs_of(response: httpx.Response) -> dict[str, list[Any]]:
    """Return the outputs of a reply, from JSON data and from binary tensors, flat."""
    assert response.status_code == 200, response.text
    length = int(response.headers.get(HEADER, len(response.content)))
    document, rest = json.loads(response.content[:length]), response.content[length:]
    found: dict[str, list[Any]] = {}
    for output in document["outputs"]:
        if "data" in output:
            found[output["name"]] = output["data"]
            continue
        size = output["parameters"]["binary_data_size"]
        tensor, rest = rest[:size], rest[size:]
        found[output["name"]] = (
            _elements(tensor) if output["datatype"] == "BYTES" else np.frombuffer(tensor, DTYPES[output["datatype"]])
        )
        assert len(found[output["name"]]) == np.prod(output["shape"])
    assert not rest
    return found


def _elements(tensor: bytes) -> list[str]:
    found = []
    while tensor:
        length = int.from_bytes(tensor[:4], "little")
        found.append(tensor[4 : 4 + length].decode())
        tensor = tensor[4 + length :]
    return found


def assert_error(response: httpx.Response, status: int, *words: str) -> str:
    """Assert that a response is an error in the shape of the protocol, and return its text."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    for word in words:
        assert word in document["error"], document
    return document["error"]
