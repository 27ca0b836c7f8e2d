"""Traces by OpenTelemetry: one span per request, and one per micro-batch with links to its requests.

Off unless the standard variables `OTEL_...` name an exporter. The request path only writes down numbers; the thread of
the exporter builds the spans. A span of the SDK that is started and ended on the event loop would cost a request more
than its forward pass in a full micro-batch.

A micro-batch belongs to no request: as a child of its first request, it would make that trace contain all others. It
has a trace of its own, its span has a link to each request, and each request has a link to it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from app.telemetry.spans import MicroBatchSpan, RequestSpan, TraceContext, new_id

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.sampling import Sampler

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACEPARENT = re.compile(
    rb"(?!ff|00-.{52}-)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
"""W3C Trace Context, 3.2. A version after 00 may append fields."""
_ALWAYS = frozenset((None, "", "parentbased_always_on"))
_SERVICE = "reconstruction-anomaly"
_SAMPLED = 1
_LONGEST_STATE = 512
"""Characters of a `tracestate` that are kept with a span, as W3C Trace Context, 3.3.1.5, asks for at least."""


class TracesError(Exception):
    """The variables `OTEL_...` ask for traces that this installation cannot export."""


class Traces:
    """Records spans and exports them.

    Args:
        exporter: gets the spans in a separate thread, some seconds later.
        resource: describes the service.
        sampler: decides about new traces. None: all are sampled, and the caller decides about its own.
        version: of the service.
    """

    def __init__(self, exporter: OTLPSpanExporter, resource: Resource, sampler: Sampler | None, version: str) -> None:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        from app.telemetry.otlp import RecordExporter

        self._sampler = sampler
        epoch = time.time_ns() - int(1e9 * time.perf_counter())
        scope = InstrumentationScope(_SERVICE, version)
        self._processor: Any = BatchSpanProcessor(RecordExporter(exporter, resource, scope, epoch))

    def begin(self, headers: Mapping[bytes, bytes]) -> TraceContext | None:
        """Return the place of a request in the trace of its caller, or in a new trace; None if it is not sampled."""
        found = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
        if found is None:
            trace_id, parent_id, flags, state = new_id(16), b"", _SAMPLED, b""
        else:
            trace_id, parent_id, (flags,) = (bytes.fromhex(part.decode()) for part in found.groups())
            state = headers.get(b"tracestate", b"")
            if len(state) > _LONGEST_STATE:
                state = b""
        if self._sampler is None:
            is_sampled = bool(flags & _SAMPLED)
        else:
            is_sampled = _is_sampled(self._sampler, trace_id, parent_id, flags)
        return TraceContext(trace_id, parent_id, state) if is_sampled else None

    def request(
        self, context: TraceContext, *, method: str, route: str, status: int, started: float, facts: Mapping[str, Any]
    ) -> None:
        """Record the span of a request that ends now.

        Args:
            context: of the request.
            method, route, status: of the request and its response.
            started: in `perf_counter` seconds.
            facts: members of its line in the access log. Must not change later.
        """
        self._processor.on_end(RequestSpan(context, method, route, status, started, time.perf_counter(), facts))

    def micro_batch(
        self, requests: Iterable[TraceContext | None], stages: Sequence[tuple[str, float, float]], **facts: Any
    ) -> None:
        """Record the span of a micro-batch with links to its sampled requests, and one span per stage below it.

        Args:
            requests: one per image; requests with several images occur several times.
            stages: name, start and end, in `perf_counter` seconds, in order.
            facts: about the micro-batch.
        """
        sampled = list(dict.fromkeys(each for each in requests if each is not None))
        if not sampled:
            return
        ids = new_id(16), new_id(8)
        for each in sampled:
            each.batch = ids
        self._processor.on_end(MicroBatchSpan(*ids, sampled, stages, facts))

    def close(self, timeout: float) -> bool:
        """Export what was recorded. Return False if `timeout` seconds were not enough."""
        # The SDK waits 30 s for a collector that does not answer, and has no argument for less.
        thread = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(timeout)
        return not thread.is_alive()


def _is_sampled(sampler: Sampler, trace_id: bytes, parent_id: bytes, flags: int) -> bool:
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    context, trace = None, int.from_bytes(trace_id)
    if parent_id:
        parent = SpanContext(trace, int.from_bytes(parent_id), True, TraceFlags(flags))
        context = set_span_in_context(NonRecordingSpan(parent))
    decision: Any = sampler.should_sample(context, trace, "request").decision
    return bool(decision.is_sampled())


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
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    try:
        BatchSpanProcessor(ConsoleSpanExporter()).shutdown()  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise TracesError(f"a variable OTEL_BSP_... has a value that cannot be used: {error}") from None


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
