"""The one way to turn a problem into an HTTP response, used by the server, the middleware and the framework."""

from __future__ import annotations

import logging
from collections.abc import Iterable, MutableMapping
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app.http.inference_protocol.errors import is_protocol_request, render_error
from app.http.negotiation import choose
from app.problems import MEDIA_TYPE, InternalError, InvalidParameter, Problem, from_status, render
from app.web import pages

_log = logging.getLogger(__name__)
_DEEPEST = 8
"""Maximum depth of a path whose problem is shown as a page: the links of the page repeat `../` for each folder."""

NOSNIFF = (b"x-content-type-options", b"nosniff")
"""Forbids browsers to guess another media type than the one of Content-Type."""


class Answer(NamedTuple):
    """A response that is sent in one piece; header names in lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def lines_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return header lines as HTTP/1.1 sends them."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def answer_problem(
    problem: Problem,
    request_id: str | None = None,
    *,
    scope: MutableMapping[str, Any] | None = None,
    close: bool = False,
) -> Answer:
    """Return the response for a problem, in the shape that the path of `scope` demands.

    The connection closes if `closes_connection` is set, because the rest of the body is not read, or if `close` is
    set, because the parser cannot continue.
    """
    named = problem.headers()
    if scope is not None and is_protocol_request(scope):
        body = render_error(problem)
        named["content-type"] = "application/json"
    else:
        body = render(problem, request_id)
    headers = [(name.encode(), value.encode()) for name, value in named.items()]
    headers += [(b"content-length", b"%d" % len(body)), NOSNIFF]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    if close or problem.closes_connection:
        headers.append((b"connection", b"close"))
    return Answer(problem.status, headers, body)


def problem_of(error: BaseException, request_id: str) -> Problem:
    """Return the problem for any error. A failure is logged and becomes an `InternalError`."""
    extra = {"request_id": request_id}
    if not isinstance(error, Problem):
        _log.error("request failed", exc_info=error, extra=extra)
        return InternalError()
    if isinstance(error, InternalError) and error.__cause__ is not None:
        _log.error("request failed: %s", type(error.__cause__).__name__, extra=extra)
    return error


def problem_facts(problem: Problem) -> dict[str, str]:
    """Return the members of the access log line about a problem."""
    return {"problem": problem.type, **({"cause": problem.cause} if problem.cause else {})}


def add_handlers(app: FastAPI) -> None:
    """Make the framework answer every error by `answer_problem`."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_failure)


async def _on_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    facts: dict[str, Any] = request.scope.get("facts", {})
    facts.update(problem_facts(problem))
    is_page = request.method == "GET" and _depth(request) <= _DEEPEST and not is_protocol_request(request.scope)
    if is_page and _prefers_html(request):
        return _page(request, problem)
    answer = answer_problem(problem, request.scope.get("request_id"), scope=request.scope)
    response = Response(answer.body, answer.status)
    # The middleware adds these headers to every response of the framework.
    added = (b"x-request-id", NOSNIFF[0])
    response.raw_headers = [header for header in answer.headers if header[0] not in added]
    return response


def _prefers_html(request: Request) -> bool:
    """Return whether the client is a browser that shows a page: only such a client prefers HTML to all other types."""
    return choose(request.headers.get("accept", ""), (MEDIA_TYPE, "text/html")) == "text/html"


def _depth(request: Request) -> int:
    """Return how many folders the path of a request has."""
    path: str = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    return path.count("/") - 1


def _page(request: Request, problem: Problem) -> Response:
    content = pages.error(problem, request.scope.get("request_id"), root="../" * max(0, _depth(request)))
    headers = {name: value for name, value in problem.headers().items() if name != "content-type"}
    return Response(content, problem.status, {**headers, **pages.HEADERS, "vary": "accept"}, "text/html")


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return await _on_problem(request, InvalidParameter(f"{name[:40]}: {first['msg']}"))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allow = (error.headers or {}).get("Allow", "")
    if "HEAD" not in allow:  # the middleware answers HEAD for every GET route
        allow = allow.replace("GET", "GET, HEAD")
    detail = "" if error.status_code in (404, 405) else str(error.detail)
    return await _on_problem(request, from_status(error.status_code, detail, allow))


async def _on_failure(request: Request, _: Exception) -> Response:
    # Starlette raises the exception again after this response, and the middleware logs it.
    return await _on_problem(request, InternalError())
