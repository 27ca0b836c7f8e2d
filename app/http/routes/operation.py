"""Declares the routes for operators: liveness, readiness and metrics."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response
from pydantic_core import to_json

from app.health import Readiness
from app.http.dependencies import ServicesDep, public_router
from app.http.negotiation import choose
from app.http.schemas import Liveness
from app.telemetry.metrics import FORMATS

router = public_router("Operation")


@router.get("/livez", summary="Is the process alive?")
async def livez() -> Liveness:
    """Return 200 while the event loop runs."""
    return Liveness()


@router.get("/readyz", responses={503: {"model": Readiness}}, summary="Can it score?")
async def readyz(services: ServicesDep, response: Response) -> Readiness:
    """Return 200 if the default model has reproduced its golden scores and the inference thread responds, else 503.

    The reply names a store that is down, but such a service stays ready: it scores images without ids.
    """
    readiness = services.health.readiness()
    response.status_code = 200 if readiness.ready else 503
    return readiness


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    """Return the OpenAPI document. Building it takes 0.1 s once, and rendering it some milliseconds."""
    content = await asyncio.to_thread(lambda: to_json(request.app.openapi()))
    return Response(content, media_type="application/json")


_MEDIA_TYPES = {each.partition(";")[0]: each for each in FORMATS}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {name: {"schema": {"type": "string"}} for name in _MEDIA_TYPES}}},
    summary="Prometheus metrics",
)
async def metrics(request: Request, services: ServicesDep) -> Response:
    """Return every metric in the Prometheus text format, or in OpenMetrics if `Accept` prefers it."""
    services.metrics.ready.set(services.health.readiness().ready)
    names = list(_MEDIA_TYPES)
    media_type = _MEDIA_TYPES[choose(request.headers.get("accept", ""), names) or names[0]]
    return Response(services.metrics.exposition(media_type), media_type=media_type, headers={"vary": "accept"})
