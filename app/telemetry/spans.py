"""Spans as the request path records them: references and numbers. `app.telemetry.otlp` makes messages of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

_SAMPLED = SimpleNamespace(trace_flags=SimpleNamespace(sampled=True))
"""The part of a span that the processor of the SDK reads."""

new_id = random.randbytes
"""Return a random id of so many bytes. It is a name, not a secret."""


class TraceContext:
    """The place of a sampled request in its trace.

    Attributes:
        trace_id, span_id: of the span of the request; 16 and 8 bytes.
        parent_id: span of the caller; empty if the trace begins here.
        state: the header `tracestate` of the caller.
        batch: trace and span of the micro-batch that scored the image of the request.
    """

    __slots__ = ("batch", "parent_id", "span_id", "state", "trace_id")

    def __init__(self, trace_id: bytes, parent_id: bytes, state: bytes) -> None:
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.span_id = new_id(8)
        self.state = state
        self.batch: tuple[bytes, bytes] | None = None

    @property
    def hex_id(self) -> str:
        """The trace id, as log lines contain it."""
        return self.trace_id.hex()


@dataclass(slots=True, eq=False)
class RequestSpan:
    """The span of a request.

    Attributes:
        place: in its trace.
        method, route, status: of the request and its response.
        start, end: in `perf_counter` seconds.
        facts: members of its line in the access log.
    """

    place: TraceContext
    method: str
    route: str
    status: int
    start: float
    end: float
    facts: Mapping[str, Any]
    context: ClassVar[object] = _SAMPLED


@dataclass(slots=True, eq=False)
class MicroBatchSpan:
    """The span of a micro-batch, in a separate trace.

    Attributes:
        trace_id, span_id: of the span; 16 and 8 bytes.
        requests: the sampled requests of its images.
        stages: name, start and end, in `perf_counter` seconds, in order; each becomes a span below this one.
        facts: about the micro-batch.
    """

    trace_id: bytes
    span_id: bytes
    requests: Sequence[TraceContext]
    stages: Sequence[tuple[str, float, float]]
    facts: Mapping[str, Any]
    context: ClassVar[object] = _SAMPLED
