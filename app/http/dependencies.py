"""Gives the routes the objects they work with, and the settings that several routers share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Security
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from pydantic import BaseModel

from app import problems
from app.concurrency.lanes import LaneWorker
from app.health import Health
from app.http.batch import BatchHandler
from app.http.inference_protocol.scoring import InferHandler
from app.http.queries import check_names
from app.http.schemas import ProblemDocument
from app.http.score import ScoreHandler
from app.inference.registry import Registry
from app.scoring.review.queue import ReviewQueue
from app.scoring.validity.monitor import ValidityMonitor
from app.stores.reconstructions import Reconstructions
from app.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Services:
    """The objects that the routes use, which `main` builds and its lifespan starts and stops."""

    registry: Registry
    reconstructions: Reconstructions
    score: ScoreHandler
    batch: BatchHandler
    infer: InferHandler
    metrics: Metrics
    validity: ValidityMonitor
    review: ReviewQueue | None
    health: Health
    pictures: LaneWorker = field(default_factory=lambda: LaneWorker("pictures"))


def services(request: Request) -> Services:
    """Return the services of the application that received this request."""
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]


ANYWHERE = (400, 403, 413, 422, 500)
"""Statuses of problems that any route may return; 503 besides, when too many connections are open, unless it is a probe
of `app.http.connection`."""


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of problem replies with these statuses, with an example of each type."""
    return {
        status: {
            "description": "A problem (RFC 9457)",
            # A reference: a copy of the schema per reply would become a class per reply in generated clients.
            "content": {
                "application/problem+json": {
                    "schema": _PROBLEM,
                    "examples": problem_examples(status, lambda problem: problem.document("id")),
                }
            },
        }
        for status in statuses
    }


_PROBLEM = {"$ref": f"#/components/schemas/{ProblemDocument.__name__}"}


def problem_examples(
    status: int, render: Callable[[problems.Problem], dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return an example of each problem type with a status, as `render` shows it."""
    kinds = [kind for kind in vars(problems).values() if inspect.isclass(kind) and issubclass(kind, problems.Problem)]
    found = {kind.type.rpartition("/")[2]: render(kind("the cause")) for kind in kinds if kind.status == status}
    return {name: {"value": document} for name, document in sorted(found.items())}


def binary(description: str) -> dict[str, Any]:
    """Return the OpenAPI description of a body that is not text."""
    return {"schema": {"type": "string", "format": "binary", "description": description}}


async def reject_unknown_parameters(request: Request) -> None:
    """Reject query parameters that the route does not declare, so that a misspelt parameter is never ignored.

    The routers of the pages do not depend on it: mail programs and social networks append parameters such as
    `utm_source` to the links that people share.

    Raises:
        InvalidParameter: the detail names the parameter.
    """
    if request.url.query:
        names = [name for name, _ in request.query_params.multi_items()]
        check_names(names, _declared_parameters(request.scope["route"]))


def _declared_parameters(route: APIRoute) -> frozenset[str]:
    """Return the names of a route's query parameters. A pydantic model declares one parameter per field."""
    names: set[str] = set()
    for parameter in route.dependant.query_params:
        kind: Any = parameter.field_info.annotation
        is_model = inspect.isclass(kind) and issubclass(kind, BaseModel)
        names |= set(kind.model_fields) if is_model else {parameter.alias}
    return frozenset(names)


KEY: Any = Security(
    APIKeyHeader(
        name="X-API-Key",
        auto_error=False,
        description="Required on every request if the operator has set a file of API keys.",
    )
)
"""Documents the API key of a router. The middleware checks the key before it calls a route."""


def protected_router(tag: str) -> APIRouter:
    """Return a router whose routes document the API key. The middleware checks the key before it calls a route."""
    dependencies = [KEY, Depends(reject_unknown_parameters)]
    return APIRouter(tags=[tag], dependencies=dependencies, responses=problem_responses(401, *ANYWHERE, 503))


def public_router(tag: str) -> APIRouter:
    """Return a router for routes that need no API key: `app.http.auth.is_public`."""
    dependencies = [Depends(reject_unknown_parameters)]
    return APIRouter(tags=[tag], dependencies=dependencies, responses=problem_responses(*ANYWHERE))
