"""Renders errors of the routes of the protocol as `{"error": "text"}`, with any status."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from pydantic_core import to_json

from app.problems import Problem

_ROOTS = ("/v1", "/v2")
_FOLDERS = tuple(f"{root}/" for root in _ROOTS)


def is_protocol_request(scope: MutableMapping[str, Any]) -> bool:
    """Return whether the path of a request belongs to the protocol, existing or not."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.startswith(_FOLDERS) or path in _ROOTS


def error_document(problem: Problem) -> dict[str, str]:
    """Return a problem in the shape of the protocol: title, detail and hint in one text."""
    text = f"{problem.title}: {problem.detail}." if problem.detail else f"{problem.title}."
    return {"error": f"{text} {problem.hint}".strip()}


def render_error(problem: Problem) -> bytes:
    """Return the body of a response with a problem in the shape of the protocol."""
    return to_json(error_document(problem))
