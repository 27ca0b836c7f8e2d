"""The HTTP surface. Each function is one route; what it does is elsewhere."""

from __future__ import annotations

import asyncio
import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response, Security
from fastapi.security import APIKeyHeader
from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.auth import owned
from app.http.schemas import (
    BatchQuery,
    BatchResponse,
    CalibrationView,
    Liveness,
    ModelList,
    ModelSummary,
    OperatingPoint,
    ProblemDocument,
    Readiness,
    ScoreHistogram,
    ScoreQuery,
    ScoreResponse,
)
from app.images import png
from app.inference.registry import Engine
from app.models.calibration import Calibration
from app.models.manifest import Manifest
from app.models.repository import RepositoryError
from app.problems import ModelNotFound, NotFound, ReconstructionNotFound, StoreUnavailable, UnsupportedAlpha
from app.scoring.batch import BulkScorer
from app.scoring.score import Scorer, threshold_of
from app.stores import StoreError
from app.stores.reconstructions import Reconstructions
from app.stores.record import Record
from app.telemetry.metrics import CONTENT_TYPE, Metrics
from app.web import pages

_KEY = re.compile(r"[0-9a-f]{44}")
_PRIVATE = {"cache-control": "private, no-store", "x-content-type-options": "nosniff"}
_LARGE = 4
View = Literal["reconstruction", "input", "error", "panel"]


@dataclass
class Services:
    """What the routes work with; made in `main`, entered by its lifespan."""

    engine: Engine
    reconstructions: Reconstructions
    scorer: Scorer
    bulk: BulkScorer
    metrics: Metrics
    draining: bool = False

    def readiness(self) -> Readiness:
        """Return whether scores can be given now, and what is missing."""
        serving = self.engine.current(self.engine.default_model)
        problems = [*self.engine.problems(), *(["the service is shutting down"] if self.draining else [])]
        return Readiness(
            ready=not problems,
            model=self.engine.default_model,
            version=serving.manifest.version if serving else None,
            device=str(self.engine.device),
            store="up" if self.reconstructions.up else "down",
            problems=problems,
        )


def services(request: Request) -> Services:
    """Return the services of the application that answers this request."""
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": ProblemDocument.model_json_schema()}}
    return {status: {"description": "A problem (RFC 9457)", "content": content} for status in statuses}


router = APIRouter(
    dependencies=[
        Security(
            APIKeyHeader(
                name="X-API-Key",
                auto_error=False,
                description="Where the operator chose so, every request needs a key.",
            )
        )
    ],
    responses=_problems(401),
)
"""What needs a key where keys are asked for. `edge` asks for them; this documents it."""
public = APIRouter(tags=["Operation"])
"""What answers without one: `keys.is_public`."""

_SCORE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


@router.post(
    "/score",
    tags=["Scores"],
    response_model=ScoreResponse,
    responses=_problems(400, 404, 408, 413, 415, 422, 500, 503, 504),
    openapi_extra=_SCORE_BODY,
    summary="Score one image",
)
async def score(request: Request, services: ServicesDep, query: Annotated[ScoreQuery, Query()]) -> Response:  # noqa: ARG001
    """Say how badly the model redraws an image, and whether that is an anomaly."""
    reply = await services.scorer(request.scope, dict(request.scope["headers"]), request.receive)
    return Response(
        reply.body, media_type="application/json", headers={"cache-control": "no-store", "server-timing": reply.timing}
    )


class _Direct(Response):
    """A response that reads the request and sends the reply itself, piece by piece."""

    def __init__(self, answer: ASGIApp) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


_BATCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}


@router.post(
    "/score/batch",
    tags=["Scores"],
    response_model=BatchResponse,
    responses={
        200: {"content": {"application/x-ndjson": {}, "application/x-npy": {}}},
        **_problems(400, 404, 408, 413, 415, 422, 500, 503, 504),
    },
    openapi_extra=_BATCH_BODY,
    summary="Score many images",
)
async def score_batch(services: ServicesDep, query: Annotated[BatchQuery, Query()]) -> Response:  # noqa: ARG001
    """Score an array of images, or the files of a form, in order; `Accept` chooses JSON, NDJSON or npy."""
    return _Direct(services.bulk)


@router.get(
    "/reconstruction/{key}",
    tags=["Scores"],
    response_class=Response,
    responses={200: {"content": {"image/png": {}, "application/json": {}}}, **_problems(404, 422, 503)},
    summary="What the model made of an image",
)
async def reconstruction(
    key: str,
    request: Request,
    services: ServicesDep,
    view: View = "reconstruction",
    scale: Annotated[int, Query(ge=1, le=16)] = 1,
) -> Response:
    """Return the reconstruction, the input, the error map or all three side by side as PNG.

    With `Accept: application/json` the answer is the reply that the score was given.
    """
    try:
        record = (
            await services.reconstructions.find(owned(request.scope.get("owner"), key)) if _KEY.fullmatch(key) else None
        )
    except StoreError:
        raise StoreUnavailable("nobody can say now what is kept under this id") from None
    if record is None:
        raise ReconstructionNotFound(f"nothing is kept under the id {key[:64]!r}")
    if request.headers.get("accept", "").startswith("application/json"):
        return Response(record.reply, media_type="application/json", headers=_PRIVATE)
    if view == "panel" or scale > _LARGE:  # many milliseconds: other scores go on meanwhile
        content = await asyncio.to_thread(_picture, record, view, scale)
    else:
        content = _picture(record, view, scale)
    peak = {"x-error-peak": f"{record.error_peak:.6g}"} if view == "error" else {}
    return Response(content, media_type="image/png", headers={**_PRIVATE, **peak})


def _picture(record: Record, view: View, scale: int) -> bytes:
    if view == "reconstruction":
        return png.encode(png.grey_picture(record.reconstruction), scale)
    if view == "input":
        return png.encode(png.grey_picture(record.input), scale)
    if view == "error":
        return png.encode(png.error_picture(record.error_map), scale)
    reply = ScoreResponse.model_validate_json(record.reply)
    planes = {
        "image": png.grey_picture(record.input),
        "reconstruction": png.grey_picture(record.reconstruction),
        "squared error": png.error_picture(record.error_map),
    }
    verdict, relation = ("anomalous", "above") if reply.is_anomaly else ("normal", "not above")
    caption = f"{verdict}: mse {reply.mse:.4g}, {relation} the threshold {reply.threshold:.4g}"
    if reply.reason:
        caption = f"anomalous: {reply.reason.replace('_', ' ')}"
    return png.panel(planes, caption, anomalous=reply.is_anomaly, scale=scale)


@router.get("/models", tags=["Models"], summary="The models that are served")
async def models(services: ServicesDep) -> ModelList:
    """List every model of the model store with the version that answers."""
    names = services.engine.names()
    return ModelList(models=await asyncio.to_thread(lambda: [_summary(services.engine, name) for name in names]))


@router.get(
    "/models/{name}",
    tags=["Models"],
    response_model=Manifest,
    responses={200: {"content": {"text/html": {}}}, **_problems(404, 422, 503)},
    summary="The manifest of the version that answers, or its model card",
)
async def model(name: str, request: Request, services: ServicesDep) -> Response:
    """Return all that the version says of itself: data, recipe, calibration, metrics.

    With `Accept: text/html`, as a browser asks, the answer is the model card as a page.
    """
    manifest = (await services.engine.select(_known(services, name))).manifest
    vary = {"vary": "accept"}
    if not request.headers.get("accept", "").startswith("text/html"):
        return Response(manifest.model_dump_json(), media_type="application/json", headers=vary)
    try:
        content = await asyncio.to_thread(services.engine.repository.read, manifest, "report/model-card.md")
        card = content.decode()
    except (RepositoryError, UnicodeDecodeError):
        raise NotFound("the version has no model card") from None
    page = pages.model_card(manifest.name, manifest.version, card)
    return Response(page, media_type="text/html", headers={**pages.HEADERS, **vary})


@router.get(
    "/models/{name}/versions/{version}/calibration",
    tags=["Models"],
    responses=_problems(404, 422),
    summary="The scores that a version's threshold was chosen on",
)
async def calibration(name: str, version: int, services: ServicesDep) -> CalibrationView:
    """Return the histogram of the calibration scores, and the threshold for each of many false-alarm rates."""
    serving = services.engine.current(name)
    if serving is not None and serving.manifest.version == version:
        return _calibration(serving.manifest, serving.calibration)
    await _manifest(services, name, version)
    try:
        artifact = await asyncio.to_thread(services.engine.repository.open, name, version)
    except RepositoryError:
        raise ModelNotFound("the version is not as it was published") from None
    return _calibration(artifact.manifest, artifact.calibration)


_RATES = sorted(
    {0.001 * n for n in range(1, 10)} | {0.005 * n for n in range(2, 20)} | {0.02 * n for n in range(5, 26)}
)


def _calibration(manifest: Manifest, calibration: Calibration) -> CalibrationView:
    points = []
    for alpha in sorted({manifest.alpha, *(round(rate, 3) for rate in _RATES)}):
        try:
            points.append(OperatingPoint(alpha=alpha, threshold=threshold_of(manifest, calibration, alpha)[0]))
        except UnsupportedAlpha:
            continue
    return CalibrationView(
        model=manifest.name,
        version=manifest.version,
        normal_class=manifest.normal_class,
        n=len(calibration.scores),
        alpha=manifest.alpha,
        threshold=manifest.threshold,
        histogram=_histogram(calibration),
        operating_points=points,
    )


def _histogram(calibration: Calibration, bins: int = 40) -> ScoreHistogram:
    low, high = calibration.scores[0], calibration.scores[-1]
    width = (high - low or math.ulp(high)) / bins
    edges = [low + n * width for n in range(bins)] + [high]
    below = [bisect_right(calibration.scores, edge) for edge in edges]
    below[0] = 0  # the lowest score lies in the first bin, not before it
    return ScoreHistogram(edges=edges, counts=[b - a for a, b in pairwise(below)])


@router.get(
    "/models/{name}/versions/{version}",
    tags=["Models"],
    responses=_problems(404, 422),
    summary="The manifest of a version",
)
async def model_version(name: str, version: int, services: ServicesDep) -> Manifest:
    """Return a version's manifest, whether it is loaded or not."""
    return await _manifest(services, name, version)


@router.get(
    "/models/{name}/versions/{version}/report/{file}",
    tags=["Models"],
    response_class=Response,
    responses={200: {"content": {"image/png": {}, "text/markdown": {}, "application/json": {}}}, **_problems(404, 422)},
    summary="A file of a version's report",
)
async def report(name: str, version: int, file: str, services: ServicesDep) -> Response:
    """Return a picture, the model card or a table of the report that training wrote."""
    manifest = await _manifest(services, name, version)
    media_type = _REPORT_TYPES.get(file.rpartition(".")[2])
    if media_type is None or f"report/{file}" not in manifest.files:
        raise NotFound("the report has no such file")
    try:
        content = await asyncio.to_thread(services.engine.repository.read, manifest, f"report/{file}")
    except RepositoryError:
        raise NotFound("the report's file is not as it was published") from None
    return Response(content, media_type=media_type, headers={"x-content-type-options": "nosniff"})


_REPORT_TYPES = {"png": "image/png", "md": "text/markdown; charset=utf-8", "json": "application/json"}


def _known(services: Services, name: str) -> str:
    if name not in services.engine.names():
        raise ModelNotFound("the model store has no model of that name")
    return name


async def _manifest(services: Services, name: str, version: int) -> Manifest:
    try:
        return await asyncio.to_thread(services.engine.repository.manifest, name, version)
    except RepositoryError:
        raise ModelNotFound("the model store has no such version") from None


def _summary(engine: Engine, name: str) -> ModelSummary:
    serving = engine.current(name)
    manifest = serving.manifest if serving else None
    return ModelSummary(
        name=name,
        current=manifest.version if manifest else None,
        versions=engine.repository.versions(name),
        is_default=name == engine.default_model,
        normal_class=manifest.normal_class if manifest else None,
        threshold=manifest.threshold if manifest else None,
        alpha=manifest.alpha if manifest else None,
        problem=engine.refusal(name),
    )


@public.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """Return the page."""
    return _file(request, "index.html")


@public.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Return the page that shows the OpenAPI document."""
    return _file(request, "docs.html")


@public.get("/page/{path:path}", include_in_schema=False)
async def page(path: str, request: Request) -> Response:
    """Return a file of the page."""
    return _file(request, path)


def _file(request: Request, path: str) -> Response:
    found = pages.files().get(path)
    if found is None:
        raise NotFound("the page has no such file")
    headers = {**pages.HEADERS, "etag": found.tag}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)


@public.get("/livez", summary="Is the process alive?")
async def livez() -> Liveness:
    """Answer as long as the event loop turns."""
    return Liveness()


@public.get("/readyz", responses={503: {"model": Readiness}}, summary="Can it score?")
async def readyz(services: ServicesDep, response: Response) -> Readiness:
    """Answer 200 when the default model reproduced its golden scores on this device and the inference thread answers.

    A store that is down is said, but does not make the service unready: scores go on without ids.
    """
    readiness = services.readiness()
    response.status_code = 200 if readiness.ready else 503
    return readiness


@public.get("/metrics", response_class=Response, summary="For Prometheus")
async def metrics(services: ServicesDep) -> Response:
    """Return every series in Prometheus' text format."""
    services.metrics.ready.set(services.readiness().ready)
    return Response(services.metrics.exposition(), media_type=CONTENT_TYPE)
