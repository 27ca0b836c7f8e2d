"""Reads query strings into the parameter models of `schemas`, and rejects unknown parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    check_names([name for name, _ in pairs], kind.model_fields)
    return _validated(kind, dict(pairs))


def check_names(names: Sequence[str], known: Collection[str]) -> None:
    """Reject parameters that a route does not have, and parameters that are given twice.

    Raises:
        InvalidParameter: the detail names the first such parameter.
    """
    for place, name in enumerate(names):
        if name not in known:
            offered = f"the parameters {', '.join(sorted(known))}" if known else "no parameters"
            raise InvalidParameter(f"unknown parameter `{name[:40]}`; the route has {offered}")
        if name in names[:place]:
            raise InvalidParameter(f"the parameter `{name}` is given twice")


def _validated(kind: type[Query], members: dict[str, str]) -> Query:
    try:
        return kind.model_validate(members)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidParameter(f"{name[:40]}: {first['msg']}") from None


def with_fields(query: Query, fields: Mapping[str, str]) -> Query:
    """Return the parameters of a query string together with those of a form.

    Raises:
        InvalidParameter: a field is invalid, or has another value in the query string.
    """
    if not fields:
        return query
    check_names(list(fields), type(query).model_fields)
    parsed = _validated(type(query), dict(fields))
    values = {name: getattr(parsed, name) for name in fields}
    for name, value in values.items():
        if name in query.model_fields_set and getattr(query, name) != value:
            raise InvalidParameter(f"{name} has different values in the query and in the form")
    return query.model_copy(update=values)
