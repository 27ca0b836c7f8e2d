"""Gives the routes the objects they work with, and the settings that several routers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Security
from fastapi.security import APIKeyHeader

from app.http.schemas import ProblemDocument, Readiness
from app.inference.registry import Engine
from app.scoring.batch import BulkScorer
from app.scoring.score import Scorer
from app.stores.reconstructions import Reconstructions
from app.telemetry.metrics import Metrics


@dataclass
class Services:
    """The objects behind the routes, which `main` builds and its lifespan starts and stops."""

    engine: Engine
    reconstructions: Reconstructions
    scorer: Scorer
    bulk: BulkScorer
    metrics: Metrics
    draining: bool = False

    def readiness(self) -> Readiness:
        """Return whether the service can score images now, and the reasons if it cannot."""
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
