"""Declares the routes that describe models, their versions and their reports."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right
from functools import partial
from itertools import pairwise

from fastapi import Request, Response

from app.http.dependencies import Services, ServicesDep, binary, problem_responses, protected_router
from app.http.negotiation import negotiate
from app.http.schemas import CalibrationView, ModelList, ModelSummary, OperatingPoint, ScoreHistogram, VersionNumber
from app.inference.registry import Registry
from app.inference.version import ModelVersion
from app.models.calibration import Calibration
from app.models.manifest import Manifest
from app.models.repository import RepositoryError
from app.problems import ModelNotFound, NotFound, StoreUnavailable, UnsupportedAlpha
from app.scoring.validity.report import Validity
from app.scoring.verdict import DecisionRule
from app.stores import StoreError
from app.web import pages
from app.web.score_chart import Row, score_chart

router = protected_router("Models")


@router.get("/models", responses=problem_responses(504), summary="The models that the service can use")
async def models(services: ServicesDep) -> ModelList:
    """Return every model of the model store with its current version."""
    names = services.registry.names()
    summaries = await services.registry.reads.run(lambda: [_summary(services.registry, name) for name in names])
    return ModelList(models=summaries)


@router.get(
    "/models/{name}",
    response_model=Manifest,
    responses={
        200: {"content": {"text/html": {"schema": {"type": "string"}}}},
        **problem_responses(404, 406, 504),
    },
    summary="The manifest of the current version, or its model card",
)
async def model(name: str, request: Request, services: ServicesDep) -> Response:
    """Return the manifest of the current version: data, recipe, calibration, metrics.

    With `Accept: text/html`, which browsers send, the reply is the model card as a page.
    """
    media_type = negotiate(request.scope["headers"], ("application/json", "text/html"))
    version = await services.registry.select(_known(services, name))
    manifest = version.manifest
    vary = {"vary": "accept"}
    if media_type == "application/json":
        return Response(manifest.model_dump_json(), media_type=media_type, headers=vary)
    try:
        content = await _read(services, manifest, "report/model-card.md")
        card = content.decode()
    except (RepositoryError, UnicodeDecodeError):
        raise NotFound("the version has no model card") from None
    status, chart = await _validity(services, version)
    page = await asyncio.to_thread(pages.model_card, manifest.name, manifest.version, card, status, chart)
    return Response(page, media_type="text/html", headers={**pages.HEADERS, **vary})


@router.get(
    "/models/{name}/versions/{version}/calibration",
    responses=problem_responses(404, 504),
    summary="The calibration scores of a version",
)
async def calibration(name: str, version: VersionNumber, services: ServicesDep) -> CalibrationView:
    """Return the histogram of the calibration scores, and the threshold for each supported false-positive rate."""
    current = services.registry.current(name)
    if current is not None and current.manifest.version == version:
        return _calibration(current.manifest, current.calibration)
    manifest = await _manifest(services, name, version)
    try:
        scores = await services.registry.reads.run(partial(services.registry.repository.calibration, manifest))
    except RepositoryError:
        raise ModelNotFound("the files of the version differ from what was published") from None
    return _calibration(manifest, scores)


@router.get(
    "/models/{name}/validity",
    responses=problem_responses(404),
    summary="Whether images still score like the calibration images",
)
async def validity(name: str, services: ServicesDep) -> Validity:
    """Return whether the images that the current version scored still resemble its calibration images."""
    version = await services.registry.select(_known(services, name))
    try:
        return await services.validity.report(version)
    except StoreError:
        raise StoreUnavailable("the store cannot look up the scores now") from None


async def _validity(services: Services, version: ModelVersion) -> tuple[str | None, str]:
    """Describe the validity of a version in a few words and a chart; None and no chart if the store does not reply."""
    try:
        found = await services.validity.report(version)
    except StoreError:
        return None, ""
    images = "1 image" if found.images == 1 else f"{found.images:,} images"
    if found.changed_after_images is not None:
        images = f"{found.changed_after_images:,} of {images}"
    latest = {each.level: each.recent for each in found.quantiles if each.recent is not None}
    rows = [
        Row("Calibration images", {each.level: each.calibration for each in found.quantiles}),
        Row("Latest images" if latest else "Latest images: none so far", latest),
    ]
    chart = score_chart(rows, version.manifest.threshold)
    return f"{found.status} after {images} (p = {found.p_value:.2g})", chart


_RATES = sorted(
    {0.001 * n for n in range(1, 10)} | {0.005 * n for n in range(2, 20)} | {0.02 * n for n in range(5, 26)}
)


def _calibration(manifest: Manifest, calibration: Calibration) -> CalibrationView:
    points = []
    for alpha in sorted({manifest.alpha, *(round(rate, 3) for rate in _RATES)}):
        try:
            rule = DecisionRule.for_alpha(manifest, calibration, alpha)
        except UnsupportedAlpha:
            continue
        points.append(OperatingPoint(alpha=alpha, threshold=rule.threshold))
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
    below[0] = 0  # the first bin includes its lower edge, where the lowest score lies
    return ScoreHistogram(edges=edges, counts=[b - a for a, b in pairwise(below)])


@router.get(
    "/models/{name}/versions/{version}",
    responses=problem_responses(404, 504),
    summary="The manifest of a version",
)
async def model_version(name: str, version: VersionNumber, services: ServicesDep) -> Manifest:
    """Return the manifest of a version, loaded or not."""
    return await _manifest(services, name, version)


@router.get(
    "/models/{name}/versions/{version}/report/{file}",
    response_class=Response,
    responses={
        200: {
            "content": {
                "image/png": binary("A PNG of a chart or of images"),
                "text/markdown": {"schema": {"type": "string"}},
                "application/json": {"schema": {"type": "object"}},
            }
        },
        **problem_responses(404, 504),
    },
    summary="A file of a version's report",
)
async def report(name: str, version: VersionNumber, file: str, services: ServicesDep) -> Response:
    """Return a picture, the model card or a table of the report that training wrote."""
    manifest = await _manifest(services, name, version)
    media_type = _REPORT_TYPES.get(file.rpartition(".")[2])
    if media_type is None or f"report/{file}" not in manifest.files:
        raise NotFound("the report has no such file")
    try:
        content = await _read(services, manifest, f"report/{file}")
    except RepositoryError:
        raise NotFound("the file of the report differs from what was published") from None
    return Response(content, media_type=media_type)


_REPORT_TYPES = {"png": "image/png", "md": "text/markdown; charset=utf-8", "json": "application/json"}


def _known(services: Services, name: str) -> str:
    if name not in services.registry.names():
        hint = "GET /models lists the models. The path contains the name alone, without a version."
        raise ModelNotFound(f"the model store has no model {name[:64]!r}", hint=hint)
    return name


async def _manifest(services: Services, name: str, version: int) -> Manifest:
    try:
        return await services.registry.reads.run(partial(services.registry.repository.manifest, name, version))
    except RepositoryError:
        raise ModelNotFound("the model store has no such version") from None


async def _read(services: Services, manifest: Manifest, file: str) -> bytes:
    return await services.registry.reads.run(partial(services.registry.repository.read, manifest, file))


def _summary(registry: Registry, name: str) -> ModelSummary:
    current = registry.current(name)
    manifest = current.manifest if current else None
    return ModelSummary(
        name=name,
        current=manifest.version if manifest else None,
        versions=registry.repository.versions(name),
        is_default=name == registry.default_model,
        normal_class=manifest.normal_class if manifest else None,
        threshold=manifest.threshold if manifest else None,
        alpha=manifest.alpha if manifest else None,
        fit=manifest.preparation.fit if manifest else None,
        problem=registry.rejection(name),
    )
