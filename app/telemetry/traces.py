"""Traces by OpenTelemetry: one span per request, and one per micro-batch with links to its requests.

Off unless the standard variables `OTEL_...` name an exporter. The request path only writes down numbers; the thread of
the exporter builds the spans. A span of the SDK that is started and ended on the event loop would cost a request more
than its forward pass in a full micro-batch.

A micro-batch belongs to no request: as a child of its first request, it would make that trace contain all others. It
has a trace of its own, its span has a link to each request, and each request has a link to it.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.sampling import Sampler

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
"""W3C Trace Context, 3.2. A later version may append fields."""
_ALWAYS = frozenset((None, "", "parentbased_always_on"))
_SERVICE = "reconstruction-anomaly"
_SAMPLED = 1


class TracesError(Exception):
    """The variables `OTEL_...` ask for traces that this installation cannot export."""


class TraceContext:
    """The place of a sampled request in its trace.

    Attributes:
        trace_id, span_id: of the span of the request.
        parent_id: span of the caller; 0 if the trace begins here.
        state: the header `tracestate` of the caller.
        batch: trace and span of the micro-batch that scored the image of the request.
    """

    __slots__ = ("batch", "parent_id", "span_id", "state", "trace_id")

    def __init__(self, trace_id: int, parent_id: int, state: bytes) -> None:
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.span_id = random.getrandbits(64) or 1
        self.state = state
        self.batch: tuple[int, int] | None = None

    @property
    def hex_id(self) -> str:
        """The trace id, as log lines contain it."""
        return f"{self.trace_id:032x}"


class _Record:
    """A span that has ended: numbers, of which `build` makes a span of the SDK."""

    __slots__ = ("attributes", "error", "ids", "is_request", "links", "name", "nanoseconds", "parent_id", "state")

    context: Any
    """The processor reads from it that the span is sampled; set by `Traces`, because it needs the SDK."""

    def __init__(
        self,
        name: str,
        ids: tuple[int, int],
        nanoseconds: tuple[int, int],
        attributes: Mapping[str, Any],
        *,
        parent_id: int = 0,
        links: Sequence[tuple[int, int]] = (),
        request: TraceContext | None = None,
        error: bool = False,
    ) -> None:
        self.name = name
        self.ids = ids
        self.nanoseconds = nanoseconds
        self.attributes = attributes
        self.parent_id = parent_id
        self.links = links
        self.is_request = request is not None
        self.state = b"" if request is None else request.state
        self.error = error

    def build(self, resource: Resource, scope: Any) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

        state = TraceState.from_header([self.state.decode("latin-1")]) if self.state else None
        flags = TraceFlags(_SAMPLED)
        trace_id, span_id = self.ids
        parent = SpanContext(trace_id, self.parent_id, self.is_request, flags, state) if self.parent_id else None
        return ReadableSpan(
            self.name,
            SpanContext(trace_id, span_id, False, flags, state),
            parent,
            resource,
            {name: value for name, value in self.attributes.items() if value is not None},
            links=[Link(SpanContext(*link, False, flags)) for link in self.links],
            kind=SpanKind.SERVER if self.is_request else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR if self.error else StatusCode.UNSET),
            start_time=self.nanoseconds[0],
            end_time=self.nanoseconds[1],
            instrumentation_scope=scope,
        )


class Traces:
    """Records spans and exports them.

    Args:
        exporter: gets the spans, in a thread of its own, some seconds later.
        resource: describes the service.
        sampler: decides about new traces. None: all are sampled, and the caller decides about its own.
        version: of the service.
    """

    def __init__(self, exporter: SpanExporter, resource: Resource, sampler: Sampler | None, version: str) -> None:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, TraceFlags

        _Record.context = SpanContext(1, 1, False, TraceFlags(_SAMPLED))
        self._sampler = sampler
        self._processor: Any = BatchSpanProcessor(
            _building(exporter, resource, InstrumentationScope(_SERVICE, version))
        )
        self._epoch = time.time_ns() - int(1e9 * time.perf_counter())

    def begin(self, headers: Mapping[bytes, bytes]) -> TraceContext | None:
        """Return the place of a request in the trace of its caller, or in a new trace; None if it is not sampled."""
        found = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
        if found is None:
            trace_id, parent_id, state = random.getrandbits(128) or 1, 0, b""
        else:
            trace_id, parent_id = int(found[1], 16), int(found[2], 16)
            state = headers.get(b"tracestate", b"")
        if self._sampler is not None:
            if not self._is_sampled(trace_id, parent_id, int(found[3], 16) if found else 0):
                return None
        elif found is not None and not int(found[3], 16) & _SAMPLED:
            return None
        return TraceContext(trace_id, parent_id, state)

    def request(
        self, context: TraceContext, *, method: str, route: str, status: int, started: float, facts: Mapping[str, Any]
    ) -> None:
        """Record the span of a request that ends now.

        Args:
            context: of the request.
            method, route, status: of the request and its response.
            started: in `perf_counter` seconds.
            facts: members of its line in the access log.
        """
        attributes = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            **{f"anomaly.{name}": value for name, value in facts.items() if name != "trace_id"},
        }
        record = _Record(
            f"{method} {route}",
            (context.trace_id, context.span_id),
            (self._ns(started), self._ns(time.perf_counter())),
            attributes,
            parent_id=context.parent_id,
            links=() if context.batch is None else (context.batch,),
            request=context,
            error=status >= 500,
        )
        self._processor.on_end(record)

    def micro_batch(
        self, requests: Iterable[TraceContext | None], stages: Sequence[tuple[str, float, float]], **attributes: Any
    ) -> None:
        """Record the span of a micro-batch with links to its sampled requests, and one span per stage below it.

        Args:
            requests: one per image; requests with several images occur several times.
            stages: name, start and end, in `perf_counter` seconds, in order.
            attributes: of the micro-batch.
        """
        sampled = {each.span_id: each for each in requests if each is not None}
        if not sampled:
            return
        trace_id, span_id = random.getrandbits(128) or 1, random.getrandbits(64) or 1
        for each in sampled.values():
            each.batch = trace_id, span_id
        times = self._ns(stages[0][1]), self._ns(stages[-1][2])
        named = {f"anomaly.{name}": value for name, value in attributes.items()}
        links = [(each.trace_id, each.span_id) for each in sampled.values()]
        self._processor.on_end(_Record("micro-batch", (trace_id, span_id), times, named, links=links))
        for name, start, end in stages:
            ids, span = (trace_id, random.getrandbits(64) or 1), (self._ns(start), self._ns(end))
            self._processor.on_end(_Record(name, ids, span, {}, parent_id=span_id))

    def close(self, timeout: float) -> bool:
        """Export what was recorded. Return False if `timeout` seconds were not enough."""
        # The SDK waits 30 s for a collector that does not answer, and has no argument for less.
        thread = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(timeout)
        return not thread.is_alive()

    def _ns(self, seconds: float) -> int:
        return self._epoch + int(1e9 * seconds)

    def _is_sampled(self, trace_id: int, parent_id: int, flags: int) -> bool:
        from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

        assert self._sampler is not None
        parent = SpanContext(trace_id, parent_id, True, TraceFlags(flags))
        context = set_span_in_context(NonRecordingSpan(parent)) if parent_id else None
        decision: Any = self._sampler.should_sample(context, trace_id, "request").decision
        return bool(decision.is_sampled())


def _building(exporter: SpanExporter, resource: Resource, scope: Any) -> SpanExporter:
    """Return an exporter that builds the spans of records and passes them on."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Building(SpanExporter):
        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            return exporter.export([record.build(resource, scope) for record in spans])

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return exporter.force_flush(timeout_millis)

    return Building()


def is_requested() -> bool:
    """Return whether the variables `OTEL_...` ask for traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    return exporter not in ("", "none") or (not exporter and any(os.environ.get(name) for name in _ENDPOINTS))


def check() -> None:
    """Check that the requested traces can be exported.

    Raises:
        TracesError: the message names the variable.
    """
    if not is_requested():
        return
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter not in ("", "otlp"):
        raise TracesError(f"OTEL_TRACES_EXPORTER={exporter} is not supported; use otlp or none")
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise TracesError(f"the OTLP protocol {protocol} is not supported; use http/protobuf")
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        raise TracesError(
            "the variables OTEL_... ask for traces; install the extra `otel`, or set OTEL_SDK_DISABLED=true"
        )


def from_environment(version: str) -> Traces | None:
    """Return the traces that the variables `OTEL_...` ask for; None if they ask for none.

    Args:
        version: of the service.

    Raises:
        TracesError: they cannot be exported.
    """
    check()
    if not is_requested():
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider

    detected = Resource.create()
    named = not str(detected.attributes.get(SERVICE_NAME, "")).startswith("unknown_service")
    resource = Resource({SERVICE_VERSION: version, **({} if named else {SERVICE_NAME: _SERVICE})})
    always = os.environ.get("OTEL_TRACES_SAMPLER") in _ALWAYS
    sampler = None if always else TracerProvider(shutdown_on_exit=False).sampler
    return Traces(OTLPSpanExporter(), detected.merge(resource), sampler, version)
