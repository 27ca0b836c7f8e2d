"""The facts about a request that do not depend on its route."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from app.telemetry.traces import Traces

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestFacts:
    """Method, headers, id and trace of a request.

    Args:
        scope: of the ASGI connection; gets the member `trace`.
        headers: of the request, names in lower case.
        new_id: returns a new request id.
        started: when the request arrived, in `perf_counter` seconds.
        traces: begins a span. None: no traces.

    Attributes:
        id: its own id, or a new one.
        facts: members of its line in the access log.
        trace: its place in a trace; None if it is not sampled.
    """

    __slots__ = ("facts", "headers", "id", "method", "scope", "started", "trace")

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        headers: Mapping[bytes, bytes],
        new_id: Callable[[], bytes],
        started: float,
        traces: Traces | None,
    ) -> None:
        self.started = started
        self.scope = scope
        self.method = scope["method"]
        self.headers = headers
        given = headers.get(b"x-request-id")
        self.id = (given if given and _REQUEST_ID.fullmatch(given) else new_id()).decode()
        self.facts: dict[str, Any] = {}
        self.trace = None if traces is None else traces.begin(self.headers)
        if self.trace is not None:
            scope["trace"] = self.trace
            self.facts["trace_id"] = self.trace.hex_id
