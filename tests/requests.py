"""Requests that tests of several routes send, and what they assert about problem responses."""

from __future__ import annotations

from typing import Any

import httpx

from tests import pngs

PNG = {"content-type": "image/png"}


async def raw(client: httpx.AsyncClient, png: bytes, query: str = "") -> httpx.Response:
    """Score an image that is the complete request body."""
    return await client.post(f"/score{query}", content=png, headers=PNG)


async def form(client: httpx.AsyncClient, *parts: tuple[str, str | None, bytes]) -> httpx.Response:
    """Send a form to `POST /score`; each part is a name, a file name or None, and its content."""
    content_type, body = pngs.multipart(*parts)
    return await client.post("/score", content=body, headers={"content-type": content_type})


def assert_problem(response: httpx.Response, status: int, type: str) -> dict[str, Any]:
    """Assert that a response is a problem with this status and type, and return its document."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"/problems/{type}"
    assert document["status"] == status
    assert document["title"]
    assert document["instance"].endswith(response.headers["x-request-id"])
    return document
