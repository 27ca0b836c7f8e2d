"""What goes over the wire and what comes back, the same for both clients.

Knows: the API, httpx's types. Does no input or output but reading an image's file.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from anomaly.client.errors import (
    Problem,
    ServiceError,
    TimedOut,
    UnexpectedReply,
    Unreachable,
    UnreadableImage,
    problem,
)
from anomaly.client.replies import Model, Score, models_of, score_of

Image = bytes | Path
"""A PNG: its bytes, or where it lies."""
Fit = Literal["strict", "mnist"]
"""`strict`: the image has the model's size. `mnist`: it is made into a digit as MNIST has them."""
View = Literal["reconstruction", "input", "error", "panel"]
"""The pictures of a score: what was redrawn, what the model saw, where they differ, all side by side."""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PROBLEM = "application/problem+json"

CONNECTIONS = 64
"""Most that a client opens."""

Answer = TypeVar("Answer")


def options(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Return what both kinds of httpx client are made with.

    Raises:
        ValueError: `url` is not one of HTTP, or the key cannot stand in a header.
    """
    try:
        parsed = httpx.URL(url)
        parsed.raw_host.decode("ascii").encode("idna")  # as connecting will: it knows labels that are too long
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"not a URL of a service: {url!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"not a URL of a service: {url!r}; write it as in http://127.0.0.1:8000")
    headers = {"accept": f"application/json, {_PROBLEM}"}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable() or not api_key.strip():
            raise ValueError("an API key has printable ASCII characters only, and at least one")
        headers["x-api-key"] = api_key.strip()
    # A call that waits for one of the connections has not begun; only the service's silence is a time-out.
    return {
        "base_url": parsed,
        "headers": headers,
        "timeout": httpx.Timeout(timeout, pool=None),
        "limits": httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
        # Loading the authorities takes longer than twenty scores. Without any, nothing encrypted would be trusted.
        "verify": parsed.scheme == "https" or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    }


def read(image: Image) -> bytes:
    """Return an image's bytes.

    Raises:
        TypeError: it is neither bytes nor a path, but a name, say.
        UnreadableImage: its file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if not hasattr(image, "read_bytes"):
        raise TypeError(f"an image is bytes or a pathlib.Path, not {type(image).__name__}")
    try:
        return image.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError: no file can have this name
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(f"{image!s} cannot be read: {words}") from error


def until_broken(images: Iterable[Image], broken: list[Exception]) -> Iterator[Image]:
    """Yield images until taking one fails, and keep what was raised: the images before it have results to yield."""
    try:
        # `yield from` would close a generator of which its owner may want the rest.
        for image in images:  # noqa: UP028
            yield image
    except Exception as error:
        broken.append(error)


def score_request(png: bytes, model: str | None, alpha: float | None, fit: Fit) -> dict[str, Any]:
    """Return httpx's arguments for `POST /score`."""
    query: dict[str, Any] = {"model": model, "alpha": alpha, "fit": None if fit == "strict" else fit}
    return {
        "method": "POST",
        "url": "/score",
        "params": {name: value for name, value in query.items() if value is not None},
        "content": png,
        "headers": {"content-type": "image/png"},
    }


def reconstruction_request(score: Score | str, view: View, scale: int) -> dict[str, Any]:
    """Return httpx's arguments for `GET /reconstruction/{id}`.

    Raises:
        ValueError: the score was not kept, or the id is none.
    """
    key = score.id if isinstance(score, Score) else score
    if key is None or not _KEY.fullmatch(key):
        raise ValueError("this score has no kept reconstruction" if key is None else f"not an id: {key!r}")
    return {
        "method": "GET",
        "url": f"/reconstruction/{key}",
        "params": {"view": view, "scale": scale},
        "headers": {"accept": f"image/png, {_PROBLEM}"},
    }


MODELS_REQUEST: dict[str, Any] = {"method": "GET", "url": "/models"}


def score_reply(response: httpx.Response) -> Score:
    """Read the reply of `POST /score`."""
    return _read(response, score_of)


def models_reply(response: httpx.Response) -> tuple[Model, ...]:
    """Read the reply of `GET /models`."""
    return _read(response, models_of)


def picture_reply(response: httpx.Response) -> bytes:
    """Read the reply of `GET /reconstruction/{id}`: a PNG."""
    if not response.content.startswith(b"\x89PNG"):
        raise UnexpectedReply(f"{_where(response)} did not answer with a PNG")
    return response.content


def check(response: httpx.Response) -> httpx.Response:
    """Return a response with status 200.

    Raises:
        Problem: what the service said.
        UnexpectedReply: it was not this service that said it.
    """
    if response.status_code == httpx.codes.OK:
        return response
    if response.is_redirect or response.status_code < 400:
        raise UnexpectedReply(f"{_where(response)} answered with status {response.status_code}")
    wait = _retry_after(response.headers.get("retry-after"))
    document: Mapping[str, Any] = {}
    if response.headers.get("content-type", "").partition(";")[0].strip().lower() == _PROBLEM:
        try:
            found = response.json()
            document = found if isinstance(found, dict) else {}
        except (ValueError, RecursionError):
            pass
    elif response.status_code == httpx.codes.NOT_FOUND:
        # Another service's 404 must not pass for "there is no such model".
        raise UnexpectedReply(f"{_where(response)} is not there; is the URL, with its prefix, right?")
    return _raise(problem(response.status_code, document, wait))


def transport_error(error: httpx.HTTPError, url: httpx.URL) -> ServiceError:
    """Say what a failure below HTTP means."""
    where = f"{url.scheme}://{url.netloc.decode()}"
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return TimedOut(f"{where} did not answer in time")
    if isinstance(error, httpx.ProtocolError | httpx.NetworkError | httpx.ConnectTimeout):
        return Unreachable(f"{where} cannot be reached: {str(error) or type(error).__name__}")
    return UnexpectedReply(f"{where} gave a reply that cannot be read: {str(error) or type(error).__name__}")


def _raise(error: Problem) -> httpx.Response:
    raise error


def _read(response: httpx.Response, read: Callable[[Mapping[str, Any]], Answer]) -> Answer:
    try:
        return read(response.json())
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UnexpectedReply(f"{_where(response)} did not answer as this service does") from error


def _where(response: httpx.Response) -> str:
    return str(response.url.copy_with(query=None, username=None, password=None))


def _retry_after(value: str | None) -> float | None:
    """Read the header in both of its forms: seconds, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
