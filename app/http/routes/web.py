"""Declares the routes of the web page and of the interactive API documentation."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.problems import NotFound
from app.web import pages

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index(request: Request) -> Response:
    """Return the page."""
    return _file(request, "index.html")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Return the page that shows the OpenAPI document."""
    return _file(request, "docs.html")


@router.get("/page/{path:path}")
async def page(path: str, request: Request) -> Response:
    """Return a file of the page."""
    return _file(request, path)


def _file(request: Request, path: str) -> Response:
    found = pages.files().get(path)
    if found is None:
        raise NotFound("the page has no such file")
    headers = {**pages.HEADERS, "etag": found.tag}
    tags = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if tags & {found.tag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
