"""Declares the routes, grouped as in the API reference."""

from __future__ import annotations

from app.http.routes import inference, models, operation, problems, reconstructions, scores, web

ROUTERS = (
    scores.router,
    reconstructions.router,
    models.router,
    inference.public,
    inference.router,
    operation.router,
    problems.router,
    web.router,
)
"""Every router of the service, for `main` to include."""
