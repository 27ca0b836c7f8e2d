"""Selects the media type of a reply from the header Accept (RFC 9110, 12.5.1)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from app.problems import NotAcceptable

_ELEMENT = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*+"?)+')
_QUALITY = re.compile(r"[qQ]\s*+=\s*+(\d*+\.?\d*+)")
_MOST_RANGES = 100
_MOST_PARAMETERS = 16


class _Range(NamedTuple):
    """A media range of the header, with its quality and its place."""

    name: str
    quality: float
    place: int


class _Match(NamedTuple):
    """The media range that decides about an offered type."""

    offered: str
    quality: float
    exact: bool
    place: int


def choose(accept: str, offered: Sequence[str]) -> str | None:
    """Return the offered media type that the client prefers, or None if it accepts none.

    The most specific range that matches a type gives its quality. Between types of the same quality, the order of the
    header decides if the header names all of them, else the order of the offer: `application/json, */*` does not
    prefer JSON to the default of the route. Parameters other than `q` are ignored, and all ranges after the first 100
    and all parameters of a range after the first 16.

    A header with a bare `*`, which the grammar does not have, is the default of Java's HttpURLConnection (`text/html,
    image/gif, image/jpeg, *; q=.2, */*; q=.2`). It names no type that the program prefers, so it counts as `*/*`.

    Args:
        accept: the header; empty if the request has none.
        offered: media types in lower case, the default of the route first.
    """
    ranges = _ranges(accept)
    if not ranges or any(each.name == "*" and each.quality > 0 for each in ranges):
        return offered[0]
    matches = [match for kind in offered if (match := _match(kind, ranges)) is not None]
    best = max((match.quality for match in matches), default=0.0)
    if best == 0:
        return None
    preferred = [match for match in matches if match.quality == best]
    if all(match.exact for match in preferred):
        preferred.sort(key=lambda match: match.place)
    return preferred[0].offered


def negotiate(headers: Iterable[tuple[bytes, bytes]], offered: Sequence[str]) -> str:
    """Return the media type for a request with these ASGI headers.

    Raises:
        NotAcceptable: the client accepts none of the offered types.
    """
    accept = b",".join(value for name, value in headers if name == b"accept")
    chosen = choose(accept.decode("latin-1"), offered)
    if chosen is None:
        raise NotAcceptable(f"the offered types are {', '.join(offered)}")
    return chosen


def _ranges(accept: str) -> list[_Range]:
    ranges = []
    for place, element in enumerate(itertools.islice(_ELEMENT.finditer(accept), _MOST_RANGES)):
        name, *parameters = (part.strip() for part in element[0].split(";", _MOST_PARAMETERS))
        if name:
            ranges.append(_Range(name.lower(), _quality(parameters), place))
    return ranges


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        found = _QUALITY.fullmatch(parameter)
        if found and found[1].strip("."):
            return min(float(found[1]), 1.0)
    return 1.0


def _match(offered: str, ranges: list[_Range]) -> _Match | None:
    for pattern in (offered, f"{offered.partition('/')[0]}/*", "*/*"):
        matching = [each for each in ranges if each.name == pattern]
        if matching:
            best = max(matching, key=lambda each: each.quality)
            return _Match(offered, best.quality, pattern == offered, best.place)
    return None
