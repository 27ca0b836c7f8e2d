"""Declares the routes of the Open Inference Protocol: v2 with the binary tensor extension, and v1 `:predict`."""

from __future__ import annotations

import functools
import re
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Response

from app.http.dependencies import (
    ANYWHERE,
    KEY,
    Services,
    ServicesDep,
    binary,
    problem_examples,
    reject_unknown_parameters,
)
from app.http.inference_protocol import metadata, schemas
from app.http.inference_protocol.errors import error_document
from app.http.routes.scores import Direct
from app.problems import ModelNotFound, ModelUnavailable

_TAG = "Open Inference Protocol"
_PIXELS = 28 * 28
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_PATHS = "GET /v1/models lists the models. A path of v2 contains a version as `/versions/{number}`."
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of errors in the shape of the protocol, with an example of each problem type."""
    return {
        status: {
            "description": "An error",
            "model": schemas.ErrorDocument,
            "content": {"application/json": {"examples": problem_examples(status, error_document)}},
        }
        for status in statuses
    }


_CHECKS = [Depends(reject_unknown_parameters)]
router = APIRouter(tags=[_TAG], dependencies=[KEY, *_CHECKS], responses=_errors(401, *ANYWHERE, 503))
public = APIRouter(tags=[_TAG], dependencies=_CHECKS, responses=_errors(*ANYWHERE, 503))


@public.get("/v2/health/live", summary="Is the process alive? (v2)")
async def v2_live() -> schemas.Live:
    """Return 200 while the event loop runs."""
    return schemas.Live()


@public.get("/v2/health/ready", responses={503: {"model": schemas.Ready}}, summary="Can it score? (v2)")
async def v2_ready(services: ServicesDep, response: Response) -> schemas.Ready:
    """Return 200 if the default model can score, else 503, as `GET /readyz` does."""
    readiness = services.health.readiness()
    response.status_code = 200 if readiness.ready else 503
    return schemas.Ready(ready=readiness.ready)


@router.get("/v2", summary="The server (v2)")
async def v2_server() -> schemas.ServerMetadata:
    """Return name and version of the service, and the extensions of the protocol that it supports."""
    return schemas.ServerMetadata.model_validate(metadata.server())


@router.get("/v2/models/{name}", responses=_errors(404, 504), summary="The tensors of a model (v2)")
async def v2_model(services: ServicesDep, name: str) -> schemas.ModelMetadata:
    """Return the names, datatypes and shapes of the tensors; -1 is the number of images."""
    return await _metadata(services, name)


@router.get(
    "/v2/models/{name}/versions/{version}", responses=_errors(404, 504), summary="The tensors of a version (v2)"
)
async def v2_model_version(services: ServicesDep, name: str, version: str) -> schemas.ModelMetadata:
    """Return the names, datatypes and shapes of the tensors, which all versions have in common."""
    return await _metadata(services, name, version)


@router.get("/v2/models/{name}/config", responses=_errors(404, 504), summary="The configuration of a model (v2)")
async def v2_config(services: ServicesDep, name: str) -> schemas.ModelConfiguration:
    """Return the configuration in the form of Triton's, for tools such as perf_analyzer."""
    return await _configuration(services, name)


@router.get(
    "/v2/models/{name}/versions/{version}/config",
    responses=_errors(404, 504),
    summary="The configuration of a version (v2)",
)
async def v2_version_config(services: ServicesDep, name: str, version: str) -> schemas.ModelConfiguration:
    """Return the configuration in the form of Triton's, which all versions have in common."""
    return await _configuration(services, name, version)


@router.get("/v2/models/{name}/ready", responses=_errors(404, 504), summary="Is a model ready? (v2)")
async def v2_model_ready(services: ServicesDep, name: str) -> schemas.ModelReady:
    """Return 200 if the current version is loaded, else 503."""
    return await _ready(services, name)


@router.get(
    "/v2/models/{name}/versions/{version}/ready", responses=_errors(404, 504), summary="Is a version ready? (v2)"
)
async def v2_version_ready(services: ServicesDep, name: str, version: str) -> schemas.ModelReady:
    """Return 200 if the version is loaded, else 503. A request that scores with the version loads it."""
    return await _ready(services, name, version)


@router.get("/v1/models", summary="The models (v1)")
async def v1_models(services: ServicesDep) -> schemas.ModelNames:
    """Return the names of all models."""
    return schemas.ModelNames(models=services.registry.names())


_STATUSES = (404, 408, 415, 504)


def _body(document: dict[str, Any]) -> dict[str, Any]:
    # Binary tensors after the JSON have no description in OpenAPI.
    return {"requestBody": {"required": True, "content": {"application/json": document}}}


_INFER: dict[str, Any] = {
    "response_model": schemas.InferResponse,
    "responses": {
        200: {"content": {"application/octet-stream": binary("The JSON, followed by the binary tensors")}},
        **_errors(*_STATUSES),
    },
    "openapi_extra": _body(schemas.INFER_BODY),
}


@router.post("/v2/models/{name}/infer", summary="Score images (v2)", **_INFER)
async def v2_infer(services: ServicesDep, name: str) -> Response:
    """Score the images of the tensor `images`: UINT8 of shape [N, 1, 28, 28], or BYTES of shape [N] with PNGs.

    With the header `Inference-Header-Content-Length`, binary tensors follow the JSON.
    """
    return Direct(functools.partial(services.infer.infer, _reference(name)))


@router.post("/v2/models/{name}/versions/{version}/infer", summary="Score images with a version (v2)", **_INFER)
async def v2_version_infer(services: ServicesDep, name: str, version: str) -> Response:
    """Score images as without a version, with this version."""
    return Direct(functools.partial(services.infer.infer, _reference(name, version)))


@router.post(
    "/v1/models/{name}:predict",
    response_model=schemas.PredictResponse,
    responses=_errors(*_STATUSES),
    openapi_extra=_body(schemas.PREDICT_BODY),
    summary="Score images (v1)",
)
async def v1_predict(services: ServicesDep, name: str) -> Response:
    """Score the images in `instances`: arrays of 28x28 grey levels, or `{"b64": "..."}` with a PNG each."""
    return Direct(functools.partial(services.infer.predict, _reference(name)))


# After `:predict`: a path matches the routes in their order, and `name` takes a colon as well.
@router.get("/v1/models/{name}", responses=_errors(404, 504), summary="Is a model ready? (v1)")
async def v1_model_ready(services: ServicesDep, name: str) -> schemas.ModelReady:
    """Return 200 if the current version of the model is loaded, else 503."""
    if name.endswith(":predict"):
        raise HTTPException(405, headers={"Allow": "POST"})
    return await _ready(services, name)


def _reference(name: str, version: str | None = None) -> str:
    """Return the reference of a version, as the registry reads it.

    Raises:
        ModelNotFound: no model or version can have that name.
    """
    if not _NAME.fullmatch(name) or (version is not None and not _NUMBER.fullmatch(version)):
        raise ModelNotFound("the model store has no such model or version", hint=_PATHS)
    return name if version is None else f"{name}@{version}"


async def _versions(services: Services, name: str, version: str | None) -> list[int]:
    """Return all versions of a model, or the one with the number `version`.

    Raises:
        ModelNotFound: there is none.
    """
    _reference(name, version)
    if name not in services.registry.names():
        raise ModelNotFound(f"the model store has no model {name}", hint=_PATHS)
    versions = await services.registry.reads.run(functools.partial(services.registry.repository.versions, name))
    if version is None:
        return versions
    if int(version) not in versions:
        raise ModelNotFound(f"the model store has no version {version} of {name}", hint=_PATHS)
    return [int(version)]


async def _metadata(services: Services, name: str, version: str | None = None) -> schemas.ModelMetadata:
    return schemas.ModelMetadata.model_validate(metadata.model(name, await _versions(services, name, version)))


async def _configuration(services: Services, name: str, version: str | None = None) -> schemas.ModelConfiguration:
    await _versions(services, name, version)
    found = metadata.config(name, services.infer.max_body_bytes // _PIXELS)
    return schemas.ModelConfiguration.model_validate(found)


async def _ready(services: Services, name: str, version: str | None = None) -> schemas.ModelReady:
    await _versions(services, name, version)
    registry = services.registry
    if registry.loaded(_reference(name, version)) is None and (
        version is None or registry.extras.get(name, int(version)) is None
    ):
        raise ModelUnavailable(registry.rejection(name) or "the version is not loaded", cause="version_rejected")
    return schemas.ModelReady(name=name, ready=True)
