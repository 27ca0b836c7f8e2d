"""Passes the trace of the caller on to the service (W3C Trace Context), without a dependency on a tracing library."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def traced(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request with the headers of the current trace, if there is one.

    The trace is that of OpenTelemetry if the program has imported its API and a span is active, else that of the
    environment variable `TRACEPARENT`.
    """
    found = _of_opentelemetry() or _of_environment()
    return {**request, "headers": {**request.get("headers", {}), **found}} if found else request


def _of_opentelemetry() -> dict[str, str]:
    carrier: dict[str, str] = {}
    propagate = sys.modules.get("opentelemetry.propagate")
    if propagate is not None:
        propagate.inject(carrier)
    return carrier


def _of_environment() -> dict[str, str]:
    parent, state = os.environ.get("TRACEPARENT", ""), os.environ.get("TRACESTATE", "")
    if not _TRACEPARENT.fullmatch(parent):
        return {}
    return {
        "traceparent": parent,
        **({"tracestate": state} if state.isascii() and state.isprintable() and state else {}),
    }
