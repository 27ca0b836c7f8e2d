"""Reads query strings into the parameter models of `schemas`, and rejects what a route does not know."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError

from app.http.schemas import ScoreQuery
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
    return _validated(kind, members)


def _validated(kind: type[Query], members: dict[str, str]) -> Query:
    try:
        return kind.model_validate(members)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidParameter(f"{name[:40]}: {first['msg']}") from None


def with_fields(query: ScoreQuery, fields: Mapping[str, str]) -> ScoreQuery:
    """Return the parameters of a query string together with those of a form.

    Raises:
        InvalidParameter: a field is invalid, or has another value in the query string.
    """
    if not fields:
        return query
    parsed = _validated(ScoreQuery, dict(fields))
    values = {name: getattr(parsed, name) for name in fields}
    for name, value in values.items():
        if name in query.model_fields_set and getattr(query, name) != value:
            raise InvalidParameter(f"{name} has different values in the query and in the form")
    return query.model_copy(update=values)
