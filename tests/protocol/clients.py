"""Calls the service with the unmodified clients of Triton and KServe, and prints what they return as JSON.

It runs in a separate environment, `.venv/protocol`, and gets only the URL of the service:

    clients.py URL MODEL IMAGES.npz [CERTIFICATE KEY]
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from tritonclient.utils import InferenceServerException

OUTPUTS = ("mse", "is_anomaly", "p_value", "reason")
url, model, path = sys.argv[1:4]
certificate, key = (*sys.argv[4:], "", "")[:2]
headers = {"X-API-Key": key}
given = np.load(path)
images: np.ndarray = given["images"]
encoded = np.array([bytes(given[f"png{n}"]) for n in range(len(images))], np.object_)
address = url.partition("://")[2]
found: dict[str, Any] = {}


def plain(outputs: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    """Return outputs as JSON values."""
    values = {name: each.ravel().tolist() for name, each in outputs.items()}
    values["reason"] = [each.decode() if isinstance(each, bytes) else each for each in values["reason"]]
    return values


def asked() -> dict[str, Any]:
    """Return the headers of a call. Triton's client adds its own to the given ones, so each call needs new ones."""
    return {"headers": dict(headers)}


def triton_input(kind: Any, *, binary: bool = True, strings: bool = False) -> Any:
    """Return the images as an input of one of Triton's clients."""
    array = encoded if strings else images
    tensor = kind.InferInput("images", list(array.shape), "BYTES" if strings else "UINT8")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def triton_blocking() -> None:
    """Call every route of this service that Triton's blocking client supports."""
    context = {"ssl": True, "ssl_context_factory": lambda: ssl.create_default_context(cafile=certificate)}
    with triton.InferenceServerClient(address, **(context if certificate else {})) as client:
        found["live"] = client.is_server_live(**asked())
        found["ready"] = client.is_server_ready(**asked())
        found["model ready"] = client.is_model_ready(model, **asked())
        found["version ready"] = client.is_model_ready(model, "1", **asked())
        found["metadata"] = client.get_server_metadata(**asked())
        found["model metadata"] = client.get_model_metadata(model, **asked())
        found["config"] = client.get_model_config(model, **asked())
        json_outputs = [triton.InferRequestedOutput(name, binary_data=False) for name in OUTPUTS]
        calls: dict[str, dict[str, Any]] = {
            "binary": {},
            "json": {"inputs": [triton_input(triton, binary=False)], "outputs": json_outputs},
            "binary to json": {"outputs": json_outputs},
            "named outputs": {"outputs": [triton.InferRequestedOutput(name) for name in OUTPUTS]},
            "bytes": {"inputs": [triton_input(triton, strings=True)]},
            "gzip": {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"},
            "deflate": {"request_compression_algorithm": "deflate", "response_compression_algorithm": "deflate"},
            "version": {"model_version": "1", "request_id": "r-1", "priority": 2, "timeout": 1_000_000},
            "alpha": {"parameters": {"alpha": 0.25}},
        }
        for name, options in calls.items():
            result = client.infer(model, **{"inputs": [triton_input(triton)], **asked(), **options})
            found[f"triton {name}"] = plain({each: result.as_numpy(each) for each in OUTPUTS})
        future = client.async_infer(model, [triton_input(triton)], **asked())
        result = future.get_result()
        found["triton async_infer"] = plain({each: result.as_numpy(each) for each in OUTPUTS})
        pictures = [triton.InferRequestedOutput(name) for name in ("reconstruction", "error_map")]
        result = client.infer(model, [triton_input(triton)], outputs=pictures, **asked())
        found["pictures"] = [list(result.as_numpy(name).shape) for name in ("reconstruction", "error_map")]
        for name, call in {
            "unknown model": lambda: client.infer("none", [triton_input(triton)], **asked()),
            "unknown output": lambda: client.infer(
                model, [triton_input(triton)], outputs=[triton.InferRequestedOutput("x")], **asked()
            ),
        }.items():
            try:
                call()
            except InferenceServerException as error:
                found[name] = [error.status(), error.message()]
        replay(client)


def replay(client: triton.InferenceServerClient) -> None:
    """Make the calls of perf_analyzer, in its order: metadata, configuration, then requests of random data."""
    metadata = client.get_model_metadata(model, **asked())
    config = client.get_model_config(model, **asked())
    extensions = client.get_server_metadata(**asked())["extensions"]
    if "statistics" in extensions:
        client.get_inference_statistics(model, **asked())
    batch = min(8, config["max_batch_size"])
    shape = [batch, *metadata["inputs"][0]["shape"][1:]]
    tensor = triton.InferInput(metadata["inputs"][0]["name"], shape, metadata["inputs"][0]["datatype"])
    tensor.set_data_from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    outputs = [triton.InferRequestedOutput(each["name"]) for each in metadata["outputs"]]
    for _ in range(3):
        result = client.infer(model, [tensor], outputs=outputs, **asked())
        found["perf_analyzer"] = [list(result.as_numpy(each["name"]).shape) for each in metadata["outputs"]]


async def triton_asyncio() -> None:
    """Call the service by Triton's asyncio client."""
    context = ssl.create_default_context(cafile=certificate) if certificate else None
    options = {"ssl": True, "ssl_context": context} if certificate else {}
    async with triton_aio.InferenceServerClient(address, **options) as client:
        for name, chosen in {"binary": {}, "json": {"binary": False}, "bytes": {"strings": True}}.items():
            results = await asyncio.gather(
                *(client.infer(model, [triton_input(triton_aio, **chosen)], headers=dict(headers)) for _ in range(4))
            )
            for result in results:
                found[f"triton aio {name}"] = plain({each: result.as_numpy(each) for each in OUTPUTS})


async def kserve_rest() -> None:
    """Call the service by KServe's client: v1 is its default, v2 has JSON and binary data."""
    verify: Any = ssl.create_default_context(cafile=certificate) if certificate else True

    def client(**config: Any) -> InferenceRESTClient:
        return InferenceRESTClient(RESTConfig(verify=verify, retries=1, **config))

    v1 = client()
    found["kserve v1 ready"] = await v1.is_model_ready(url, model, headers=dict(headers))
    for name, instances in {
        "arrays": images.tolist(),
        "b64": [{"b64": base64.b64encode(each).decode()} for each in encoded],
    }.items():
        reply = await v1.infer(url, {"instances": instances}, model_name=model, headers=dict(headers))
        found[f"kserve v1 {name}"] = {each: [p[each] for p in reply["predictions"]] for each in OUTPUTS}
    v2 = client(protocol="v2")
    found["kserve v2 ready"] = [
        await v2.is_server_live(url, headers=dict(headers)),
        await v2.is_server_ready(url, headers=dict(headers)),
        await v2.is_model_ready(url, model, headers=dict(headers)),
    ]
    for name, binary in {"json": False, "binary": True}.items():
        for strings in (False, True) if binary else (False,):
            array = encoded if strings else images
            tensor = InferInput("images", list(array.shape), "BYTES" if strings else "UINT8")
            tensor.set_data_from_numpy(array, binary_data=binary)
            request = InferRequest(model, [tensor], parameters={"binary_data_output": binary})
            reply = await v2.infer(url, request, model_name=model, headers=dict(headers))
            outputs = {each.name: each.as_numpy() for each in reply.outputs}
            found[f"kserve v2 {name}{' bytes' if strings else ''}"] = plain(outputs)
    try:
        await v2.infer(url, request, model_name="none", headers=dict(headers))
    except httpx.HTTPStatusError as error:
        found["kserve unknown model"] = [str(error.response.status_code), str(error)]
    await v1.close()
    await v2.close()


triton_blocking()
steps: tuple[Callable[[], Awaitable[None]], ...] = (triton_asyncio, kserve_rest)
for step in steps:
    asyncio.run(step())
sys.stdout.write(json.dumps(found))
