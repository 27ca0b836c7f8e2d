"""Declares the route that returns stored reconstructions."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import Query, Request, Response

from app.http.dependencies import ServicesDep, binary, problem_responses, protected_router
from app.http.fitting import client_of
from app.http.negotiation import negotiate
from app.http.schemas import ScoreResponse
from app.images import pictures
from app.problems import NO_STORE, ReconstructionNotFound, StoreUnavailable
from app.stores import StoreError
from app.stores.records import Record

router = protected_router("Scores")

_ID = re.compile(r"[0-9a-f]{44}")
_TYPES = ("image/png", "application/json")
_HEADERS = {"cache-control": f"private, {NO_STORE}", "vary": "accept"}
_LARGE = 4
"""Scale above which a picture is drawn in another thread."""
View = Literal["reconstruction", "input", "error", "panel"]
ErrorScale = Literal["threshold", "image"]
_THRESHOLDS = 10.0
"""Squared error of a pixel, in thresholds, that is pale yellow: normal images of the model `zero` stay below it."""


@router.get(
    "/reconstruction/{id}",
    response_class=Response,
    responses={
        200: {"model": ScoreResponse, "content": {"image/png": binary("A PNG of the chosen view")}},
        **problem_responses(404, 406),
    },
    summary="The reconstruction of a scored image",
)
async def reconstruction(
    id: str,
    request: Request,
    services: ServicesDep,
    *,
    view: View = "reconstruction",
    scale: Annotated[int, Query(ge=1, le=16, description="Side of one pixel, in pixels")] = 1,
    error_scale: Annotated[
        ErrorScale,
        Query(
            description="The brightest colour of the error map. `threshold`: 10 times the threshold, the same for all "
            "images. `image`: the maximum of this image"
        ),
    ] = "threshold",
) -> Response:
    """Return the reconstruction, the input, the error map or all three side by side as PNG.

    With `Accept: application/json` the reply is the JSON document of the score.
    """
    media_type = negotiate(request.scope["headers"], _TYPES)
    try:
        record = await services.reconstructions.find(id, request.scope.get("owner")) if _ID.fullmatch(id) else None
    except StoreError:
        raise StoreUnavailable("the store cannot look up this id now") from None
    if record is None:
        raise ReconstructionNotFound(f"no reconstruction has the id {id[:64]!r}")
    if media_type == "application/json":
        return Response(record.reply, media_type="application/json", headers=_HEADERS)
    if view == "panel" or scale > _LARGE:  # takes many milliseconds, which must not block the event loop
        lane = client_of(request.scope)
        content = await services.pictures.run(lambda: _picture(record, view, scale, error_scale), lane)
    else:
        content = _picture(record, view, scale, error_scale)
    limit = {}
    if view == "error":
        limit = {
            "x-error-peak": f"{record.error_peak:.6g}",
            "x-error-limit": f"{_error_limit(record, error_scale):.6g}",
        }
    return Response(content, media_type="image/png", headers={**_HEADERS, **limit})


def _error_limit(record: Record, error_scale: ErrorScale) -> float:
    """Return the squared error that the brightest colour stands for."""
    if error_scale == "image":
        return record.error_peak
    return _THRESHOLDS * ScoreResponse.model_validate_json(record.reply).threshold


def _picture(record: Record, view: View, scale: int, error_scale: ErrorScale) -> bytes:
    if view == "reconstruction":
        return pictures.encode(pictures.grey_picture(record.reconstruction), scale)
    if view == "input":
        return pictures.encode(pictures.grey_picture(record.input), scale)
    gain = 1.0 if error_scale == "image" else record.error_peak / _error_limit(record, error_scale)
    if view == "error":
        return pictures.encode(pictures.error_picture(record.error_map, gain), scale)
    reply = ScoreResponse.model_validate_json(record.reply)
    planes = {
        "image": pictures.grey_picture(record.input),
        "reconstruction": pictures.grey_picture(record.reconstruction),
        "squared error": pictures.error_picture(record.error_map, gain),
    }
    verdict, relation = ("anomalous", "above") if reply.is_anomaly else ("normal", "not above")
    caption = f"{verdict}: mse {reply.mse:.4g}, {relation} the threshold {reply.threshold:.4g}"
    if reply.reason:
        caption = f"anomalous: {reply.reason.replace('_', ' ')}"
    return pictures.panel(planes, caption, anomalous=reply.is_anomaly, scale=scale)
