"""Encodes recorded spans as OTLP messages and sends them, in the thread of the SDK's processor.

The encoder of the SDK makes new messages for each attribute and copies them. Per request, that takes longer than all
other work for its traces.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, SpanFlags, Status
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN_CONTEXT, TraceState

from app.telemetry.spans import MicroBatchSpan, RequestSpan, new_id

_LOCAL = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE = _LOCAL | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
_FIELDS = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value"}
_TEMPLATES = 128
"""Maximum number of kept templates. Clients choose the method."""


class RecordExporter(SpanExporter):
    """Exports `RequestSpan` and `MicroBatchSpan`.

    Args:
        exporter: sends the messages.
        resource, scope: describe the service and this code.
        epoch: Unix time of `perf_counter` 0, in ns.
    """

    def __init__(self, exporter: OTLPSpanExporter, resource: Resource, scope: InstrumentationScope, epoch: int) -> None:
        self._exporter = exporter
        # The exporter has no public method that accepts an encoded message.
        self._send = exporter._client.export
        self._epoch = epoch
        self._template = functools.lru_cache(_TEMPLATES)(_RequestTemplate)
        self._empty = encode_spans(
            [ReadableSpan("", INVALID_SPAN_CONTEXT, resource=resource, instrumentation_scope=scope)]
        )
        """A message with resource and scope."""
        self._empty.resource_spans[0].scope_spans[0].ClearField("spans")

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        """Send recorded spans in one message."""
        message = ExportTraceServiceRequest()
        message.CopyFrom(self._empty)
        encoded = message.resource_spans[0].scope_spans[0].spans
        for span in spans:
            if isinstance(span, RequestSpan):
                self._add_request(encoded, span)
            else:
                self._add_micro_batch(encoded, span)
        sent = self._send(message.SerializeToString())
        return SpanExportResult.SUCCESS if sent.success else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Close the connection."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _add_request(self, spans: Any, request: RequestSpan) -> None:
        place = request.place
        template = self._template(
            request.method, request.route, request.status, tuple(request.facts), place.batch is not None
        )
        span = template.span
        span.trace_id, span.span_id, span.parent_span_id = place.trace_id, place.span_id, place.parent_id
        span.flags = _REMOTE if place.parent_id else _LOCAL
        span.trace_state = _normalized(place.state) if place.state else ""
        span.start_time_unix_nano, span.end_time_unix_nano = self._ns(request.start), self._ns(request.end)
        if place.batch is not None:
            template.link.trace_id, template.link.span_id = place.batch
        for value, fact in zip(template.values, request.facts.values(), strict=True):
            _set(value, fact)
        spans.append(span)

    def _add_micro_batch(self, spans: Any, batch: MicroBatchSpan) -> None:
        span = spans.add(
            trace_id=batch.trace_id,
            span_id=batch.span_id,
            flags=_LOCAL,
            name="micro-batch",
            kind=Span.SPAN_KIND_INTERNAL,
            start_time_unix_nano=self._ns(batch.stages[0][1]),
            end_time_unix_nano=self._ns(batch.stages[-1][2]),
        )
        for fact, value in batch.facts.items():
            _set(span.attributes.add(key=f"anomaly.{fact}").value, value)
        for place in batch.requests:
            span.links.add(trace_id=place.trace_id, span_id=place.span_id, flags=_LOCAL)
        for name, start, end in batch.stages:
            spans.add(
                trace_id=batch.trace_id,
                span_id=new_id(8),
                parent_span_id=batch.span_id,
                flags=_LOCAL,
                name=name,
                kind=Span.SPAN_KIND_INTERNAL,
                start_time_unix_nano=self._ns(start),
                end_time_unix_nano=self._ns(end),
            )

    def _ns(self, seconds: float) -> int:
        return self._epoch + int(1e9 * seconds)


class _RequestTemplate:
    """A span of requests that differ only in ids, times and the values of facts.

    To set these and to copy the message takes a third of the time of building it.

    Args:
        method, route, status: of the requests and their responses.
        names: of the facts.
        has_link: whether the span has a link.

    Attributes:
        span: the message.
        link: its link.
        values: the value of each fact, in order.
    """

    def __init__(self, method: str, route: str, status: int, names: Sequence[str], has_link: bool) -> None:
        self.span = Span(name=f"{method} {route}", kind=Span.SPAN_KIND_SERVER)
        if status >= 500:
            self.span.status.code = Status.STATUS_CODE_ERROR
        known = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        for name, value in known.items():
            _set(self.span.attributes.add(key=name).value, value)
        # The span has its trace id already.
        self.values = [
            AnyValue() if name == "trace_id" else self.span.attributes.add(key=f"anomaly.{name}").value
            for name in names
        ]
        self.link = self.span.links.add(flags=_LOCAL) if has_link else Span.Link()


def _set(value: AnyValue, fact: Any) -> None:
    field = _FIELDS.get(type(fact))
    if field is not None:
        setattr(value, field, fact)
    elif fact is None:
        value.Clear()
    else:
        value.string_value = str(fact)


def _normalized(state: bytes) -> str:
    """Return a `tracestate` without the members that W3C Trace Context does not allow."""
    return TraceState.from_header([state.decode("latin-1")]).to_header()
