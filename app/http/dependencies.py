"""Gives the routes the objects they work with, and the settings that several routers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Security
from fastapi.security import APIKeyHeader

from app.health import Health
from app.http.batch import BatchHandler
from app.http.schemas import ProblemDocument
from app.http.score import ScoreHandler
from app.inference.registry import Registry
from app.stores.reconstructions import Reconstructions
from app.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Services:
    """The objects behind the routes, which `main` builds and its lifespan starts and stops."""

    registry: Registry
    reconstructions: Reconstructions
    score: ScoreHandler
    batch: BatchHandler
    metrics: Metrics
    health: Health


def services(request: Request) -> Services:
    """Return the services of the application that received this request."""
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of problem replies with these statuses."""
    content = {"application/problem+json": {"schema": ProblemDocument.model_json_schema()}}
    return {status: {"description": "A problem (RFC 9457)", "content": content} for status in statuses}


_KEY = APIKeyHeader(
    name="X-API-Key",
    auto_error=False,
    description="Required on every request if the operator has set a file of API keys.",
)


def protected_router(tag: str) -> APIRouter:
    """Return a router whose routes document the API key. The middleware checks the key before it calls a route."""
    return APIRouter(tags=[tag], dependencies=[Security(_KEY)], responses=problem_responses(401))


def public_router(tag: str) -> APIRouter:
    """Return a router for routes that need no API key: `app.http.auth.is_public`."""
    return APIRouter(tags=[tag])
