"""Declares the pages that explain the problem types, which every problem document names in `type`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from app.http.negotiation import negotiate
from app.problems import NotFound
from app.web import pages
from app.web.explanations import explanations

router = APIRouter(include_in_schema=False)

_TYPES = ("text/html", "application/json")


@router.get("/problems")
async def index(request: Request) -> Response:
    """Return the list of all problem types."""
    found = list(explanations().values())
    if negotiate(request.scope["headers"], _TYPES) == "text/html":
        return _reply(pages.problem_list(found), "text/html")
    return _reply(to_json({"problems": found}), "application/json")


@router.get("/problems/{name}")
async def problem(name: str, request: Request) -> Response:
    """Return the explanation of one problem type."""
    found = explanations().get(name)
    if found is None:
        raise NotFound("there is no problem type of this name; GET /problems lists all types")
    if negotiate(request.scope["headers"], _TYPES) == "text/html":
        return _reply(pages.problem(found), "text/html")
    return _reply(to_json(found), "application/json")


def _reply(content: bytes, media_type: str) -> Response:
    return Response(content, media_type=media_type, headers={**pages.HEADERS, "vary": "accept"})
