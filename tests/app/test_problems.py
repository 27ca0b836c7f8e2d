"""Problems: each kind has a distinct type, and no kind reveals internal details."""

from __future__ import annotations

import inspect
import json

import pytest

from app import problems

KINDS = [
    kind
    for _, kind in inspect.getmembers(problems, inspect.isclass)
    if issubclass(kind, problems.Problem) and kind is not problems.Problem
]


def test_types_are_unique() -> None:
    """No two kinds share a type."""
    types = [kind.type for kind in KINDS]
    assert len(set(types)) == len(types)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_documents_follow_rfc_9457(kind: type[problems.Problem]) -> None:
    """A document has type, title, status and a hint, and the request id if there is a request."""
    document = json.loads(problems.render(kind("why"), "abc"))
    assert document["type"].startswith("/problems/")
    assert document["status"] == kind.status
    assert document["title"]
    assert document["hint"]
    assert document["detail"] == "why"
    assert document["instance"] == "urn:request:abc"
    assert kind("why").headers()["content-type"] == "application/problem+json"


@pytest.mark.parametrize("status", [400, 404, 405, 413, 415, 418, 422, 500, 501])
def test_statuses_of_the_framework_become_problems(status: int) -> None:
    """The problem keeps any status that the framework chose."""
    assert problems.from_status(status, "why").document()["status"] == status
