"""Build the requests of both clients and read the replies. Does no input or output."""

from __future__ import annotations

import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import httpx

from anomaly.client import environment, images
from anomaly.client.errors import (
    ConnectionFailed,
    Problem,
    ServiceError,
    TimedOut,
    UnexpectedReply,
    Unreachable,
    problem,
)
from anomaly.client.replies import (
    Calibration,
    Model,
    Readiness,
    Score,
    Validity,
    batch_of,
    calibration_of,
    models_of,
    readiness_of,
    score_of,
    validity_of,
    version_of,
)

Fit = Literal["strict", "mnist"]
"""`strict`: the image has the size of the model's input. `mnist`: the service makes a digit in MNIST's form of it."""
View = Literal["reconstruction", "input", "error", "panel"]
"""The pictures of a score: the reconstruction, the model's input, the error map, or all three side by side."""
Request = dict[str, Any]
"""The arguments of `httpx.Client.request`."""

CONNECTIONS = 64
"""Maximum number of connections of a client."""
BATCH_IMAGES = 2048
"""Maximum number of images per batch request. The service scores as many well within the default timeout."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PROBLEM = "application/problem+json"
_LOCAL = frozenset(("localhost", "127.0.0.1", "::1"))

Reply = TypeVar("Reply")


def options(url: str | None, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Return the arguments of both kinds of httpx client.

    Raises:
        ValueError: the address, the key, or a variable of the environment is not valid.
    """
    parsed = environment.parse_url(url)
    headers = {"accept": f"application/json, {_PROBLEM}"}
    if api_key is not None:
        headers["x-api-key"] = environment.clean_key(api_key)
    elif url is None and (key := environment.api_key()) is not None:
        # The key of the environment belongs to the address of the environment; no other server gets it.
        headers["x-api-key"] = key
    return {
        "base_url": parsed,
        "headers": headers,
        # The wait for a free connection is not limited: only a silent service is a timeout.
        "timeout": httpx.Timeout(timeout, pool=None),
        "limits": httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
        "verify": environment.tls_context(parsed),
        "proxy": environment.proxy_of(parsed),
        "trust_env": False,
    }


def score_request(png: bytes, model: str | None, alpha: float | None, fit: Fit) -> Request:
    """Return the request `POST /score`."""
    return {
        "method": "POST",
        "url": "/score",
        "params": _given(model=model, alpha=alpha, fit=None if fit == "strict" else fit),
        "content": png,
        "headers": {"content-type": "image/png"},
    }


def batch_requests(stack: images.Array, model: str | None, alpha: float | None) -> Iterator[Request]:
    """Yield the requests `POST /score/batch` for a stack of images.

    Raises:
        TypeError: the stack is not a uint8 array of shape [N, 28, 28].
    """
    images.check_stack(stack)
    for start in range(0, stack.shape[0], BATCH_IMAGES):
        yield {
            "method": "POST",
            "url": "/score/batch",
            "params": _given(model=model, alpha=alpha),
            "content": images.npy(stack[start : start + BATCH_IMAGES]),
            "headers": {"content-type": "application/x-npy"},
        }


def reconstruction_request(score: Score | str, view: View, scale: int) -> Request:
    """Return the request `GET /reconstruction/{id}`.

    Raises:
        ValueError: the service stored no reconstruction of this score, or the text is not an id.
    """
    identifier = score.id if isinstance(score, Score) else score
    if identifier is None:
        raise ValueError("the service stored no reconstruction of this score")
    if not _ID.fullmatch(identifier):
        raise ValueError(f"not the id of a reconstruction: {identifier!r}")
    return {
        "method": "GET",
        "url": f"/reconstruction/{identifier}",
        "params": {"view": view, "scale": scale},
        "headers": {"accept": f"image/png, {_PROBLEM}"},
    }


MODELS_REQUEST: Request = {"method": "GET", "url": "/models"}
READY_REQUEST: Request = {"method": "GET", "url": "/readyz"}


def manifest_request(name: str) -> Request:
    """Return the request `GET /models/{name}`."""
    return {"method": "GET", "url": f"/models/{quote(name, safe='')}"}


def model_card_request(name: str, version: str) -> Request:
    """Return the request for the model card of a version, as Markdown."""
    return {**_of_version(name, version, "report/model-card.md"), "headers": {"accept": f"text/markdown, {_PROBLEM}"}}


def calibration_request(name: str, version: str) -> Request:
    """Return the request for the calibration of a version."""
    return _of_version(name, version, "calibration")


def validity_request(name: str) -> Request:
    """Return the request `GET /models/{name}/validity`."""
    return {"method": "GET", "url": f"/models/{quote(name, safe='')}/validity"}


def score_reply(response: httpx.Response) -> Score:
    """Read the reply of `POST /score`."""
    return _read(response, score_of)


def batch_reply(response: httpx.Response) -> list[Score | Problem]:
    """Read the reply of `POST /score/batch`."""
    return _read(response, batch_of)


def models_reply(response: httpx.Response) -> tuple[Model, ...]:
    """Read the reply of `GET /models`."""
    return _read(response, models_of)


def version_reply(response: httpx.Response) -> str:
    """Read the version of the manifest that `GET /models/{name}` returns."""
    return _read(response, version_of)


def calibration_reply(response: httpx.Response) -> Calibration:
    """Read the reply of the calibration route."""
    return _read(response, calibration_of)


def validity_reply(response: httpx.Response) -> Validity:
    """Read the reply of `GET /models/{name}/validity`."""
    return _read(response, validity_of)


def readiness_reply(response: httpx.Response) -> Readiness:
    """Read the reply of `GET /readyz`, whose 503 contains the same document as its 200."""
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE and _media_type(response) == "application/json":
        return _read(response, readiness_of)
    return _read(check(response), readiness_of)


def picture_reply(response: httpx.Response) -> bytes:
    """Read the reply of `GET /reconstruction/{id}`: a PNG."""
    if not response.content.startswith(b"\x89PNG"):
        raise UnexpectedReply(f"{_address(response)} did not return a PNG")
    return response.content


def check(response: httpx.Response) -> httpx.Response:
    """Return a response of status 200.

    Raises:
        Problem: the service rejected the request.
        UnexpectedReply: the reply did not come from this service.
    """
    if response.status_code == httpx.codes.OK:
        return response
    if response.is_redirect or response.status_code < 400:
        raise UnexpectedReply(f"{_address(response)} returned status {response.status_code}")
    document: Mapping[str, Any] = {}
    if _media_type(response) == _PROBLEM:
        try:
            found = response.json()
            document = found if isinstance(found, dict) else {}
        except (ValueError, RecursionError):
            pass
    elif response.status_code == httpx.codes.NOT_FOUND:
        # The 404 of another service must not become ModelNotFound.
        raise UnexpectedReply(f"{_address(response)} does not exist; check the URL and its path prefix")
    raise problem(response.status_code, document, _retry_after(response.headers.get("retry-after")))


def transport_error(error: httpx.HTTPError, url: httpx.URL) -> ServiceError:
    """Return the client's exception for a failure below HTTP."""
    address = f"{url.scheme}://{url.netloc.decode()}"
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
        return ConnectionFailed(f"{address} cannot be reached: {_reason(error)}; {_advice(error, url)}")
    if isinstance(error, httpx.TimeoutException):
        return TimedOut(f"{address} did not reply in time")
    if isinstance(error, httpx.ProtocolError | httpx.NetworkError):
        return Unreachable(f"{address} cannot be reached: {_reason(error)}")
    return UnexpectedReply(f"{address} returned a reply that cannot be read: {_reason(error)}")


def _reason(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        # The messages of httpx and asyncio are generic. The error of the operating system is in a cause.
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError | socket.gaierror) and cause.errno:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__


def _advice(error: Exception, url: httpx.URL) -> str:
    if isinstance(error, httpx.ProxyError):
        return "the proxy comes from the environment; NO_PROXY lists hosts that need none"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "SSL_CERT_FILE names the file of other certificate authorities"
    if url.host in _LOCAL:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        return (
            f"start a service with `anomaly serve --port {port}` in a checkout, "
            f"or with `docker run -p {port}:8000 anomaly-api`, or set {environment.URL} to the address of one"
        )
    return f"check the address ({environment.URL}) and that the service is running"


def _given(**parameters: Any) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _of_version(name: str, version: str, path: str) -> Request:
    return {"method": "GET", "url": f"/models/{quote(name, safe='')}/versions/{quote(version, safe='')}/{path}"}


def _read(response: httpx.Response, read: Callable[[Mapping[str, Any]], Reply]) -> Reply:
    try:
        return read(response.json())
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UnexpectedReply(f"{_address(response)} did not return what this service returns") from error


def _address(response: httpx.Response) -> str:
    return str(response.url.copy_with(query=None, username=None, password=None))


def _media_type(response: httpx.Response) -> str:
    content_type: str = response.headers.get("content-type", "")
    return content_type.partition(";")[0].strip().lower()


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, which contains either seconds or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
