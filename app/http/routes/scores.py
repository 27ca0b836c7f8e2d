"""Declares the routes that score images. `app.scoring` reads the bodies and computes the scores."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.dependencies import ServicesDep, binary, problem_responses, protected_router
from app.http.schemas import BatchQuery, BatchResponse, ScoreQuery, ScoreResponse
from app.problems import NO_STORE

router = protected_router("Scores")


def _form_fields() -> dict[str, Any]:
    """Return the schemas of the parameters as fields of a form, where null does not exist."""
    fields = {}
    for name, found in ScoreQuery.model_json_schema()["properties"].items():
        schema = {key: value for key, value in found.items() if key != "anyOf" and (key, value) != ("default", None)}
        fields[name] = {**schema, **next((kind for kind in found.get("anyOf", ()) if kind != {"type": "null"}), {})}
    return fields


_SCORE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/png": binary("A PNG of one image"),
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}, **_form_fields()},
                }
            },
        },
    }
}


@router.post(
    "/score",
    response_model=ScoreResponse,
    responses=problem_responses(404, 408, 415, 504),
    openapi_extra=_SCORE_BODY,
    summary="Score one image",
)
async def score(request: Request, services: ServicesDep, query: Annotated[ScoreQuery, Query()]) -> Response:  # noqa: ARG001
    """Return the anomaly score of one image, and whether the image is an anomaly."""
    reply = await services.score(request.scope, dict(request.scope["headers"]), request.receive)
    return Response(
        reply.body, media_type="application/json", headers={"cache-control": NO_STORE, "server-timing": reply.timing}
    )


class Direct(Response):
    """A response that reads the request body and sends the reply itself, so that both can be streamed."""

    def __init__(self, answer: ASGIApp) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply."""
        await self._answer(scope, receive, send)


_BATCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-npy": binary("A file of numpy.save: uint8 [N, 28, 28]"),
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "model": {"type": "string"},
                        "alpha": {"type": "number"},
                        "fdr": {"type": "number"},
                        "store": {"type": "boolean"},
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            },
        },
    }
}


@router.post(
    "/score/batch",
    response_model=BatchResponse,
    responses={
        200: {
            "content": {
                "application/x-ndjson": {"schema": {"type": "string"}},
                "application/x-npy": binary("A file of numpy.save with the scores: float32 [N]"),
            }
        },
        **problem_responses(404, 406, 408, 415, 504),
    },
    openapi_extra=_BATCH_BODY,
    summary="Score many images",
)
async def score_batch(services: ServicesDep, query: Annotated[BatchQuery, Query()]) -> Response:  # noqa: ARG001
    """Score the images of an array, or the files of a form, in order. `Accept` selects JSON, NDJSON or npy."""
    return Direct(services.batch)
