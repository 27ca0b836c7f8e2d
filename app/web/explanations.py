"""Explains every problem type: those of the service, and those that only the gateway returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from app.problems import Problem


@dataclass(frozen=True)
class Explanation:
    """The meaning of a problem type.

    Attributes:
        type: the member `type` of its documents.
        title: the member `title`.
        status: HTTP status code.
        meaning: when it is returned.
        advice: what the client can do.
    """

    type: str
    title: str
    status: int
    meaning: str
    advice: str

    @property
    def name(self) -> str:
        """The last part of the type."""
        return self.type.rpartition("/")[2]


_OF_THE_GATEWAY = (
    Explanation(
        "/problems/too-many-requests",
        "Too many requests",
        429,
        "The API key or the address has sent more requests, or more wrong keys, than the gateway allows.",
        "Send fewer requests per second, and try again after the seconds that Retry-After names.",
    ),
    Explanation(
        "/problems/bad-gateway",
        "The connection to the service broke",
        502,
        "The connection between the gateway and the service closed before the reply was complete.",
        "Try again.",
    ),
    Explanation(
        "/problems/unavailable",
        "No replica is ready",
        503,
        "No replica of the service can take the request now.",
        "Try again after the seconds that Retry-After names.",
    ),
)
"""Types of deploy/gateway/haproxy.cfg that the service itself never returns."""


@cache
def explanations() -> dict[str, Explanation]:
    """Return every explanation by its name, sorted by status and name."""
    found = [*map(_explain, _kinds(Problem)), *_OF_THE_GATEWAY]
    return {each.name: each for each in sorted(found, key=lambda each: (each.status, each.name))}


def _kinds(kind: type[Problem]) -> Iterator[type[Problem]]:
    for child in kind.__subclasses__():
        yield child
        yield from _kinds(child)


def _explain(kind: type[Problem]) -> Explanation:
    return Explanation(kind.type, kind.title, kind.status, inspect.getdoc(kind) or kind.title, kind.hint)
