"""Reads query strings into the parameter models of `schemas`, and rejects what a route does not know."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError

from app.problems import InvalidParameter, MalformedRequest

Query = TypeVar("Query", bound=BaseModel)

LONGEST_QUERY = 1024
"""Maximum number of bytes of a query string. Parsed queries are cached, so the limit bounds the cache's memory."""


def parse_query(kind: type[Query], text: bytes) -> Query:
    """Read a query string.

    Raises:
        MalformedRequest: it has more than `LONGEST_QUERY` bytes.
        InvalidParameter: a parameter is unknown, given twice, or has a value that means nothing.
    """
    if len(text) > LONGEST_QUERY:
        raise MalformedRequest(f"the query has more than {LONGEST_QUERY} bytes")
    query: Query = _parsed(kind, text)
    return query


@lru_cache(maxsize=1024)
def _parsed(kind: type[Query], text: bytes) -> Query:
    pairs = parse_qsl(text.decode("latin-1"), keep_blank_values=True)
    members = dict(pairs)
    if len(members) < len(pairs):
        raise InvalidParameter("a parameter is given twice")
    try:
        return kind.model_validate(members)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidParameter(f"{name[:40]}: {first['msg']}") from None
