"""The client passes the trace of its program on to the service."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider

from anomaly import AsyncClient, Client
from anomaly.client.tracing import traced
from tests.conftest import Server, interop
from tests.otlp import receiving

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture(autouse=True)
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the trace of the shell."""
    for name in [name for name in os.environ if name.startswith(("TRACE", "OTEL_"))]:
        monkeypatch.delenv(name)


def test_the_trace_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A valid `TRACEPARENT` becomes a header, besides those of the request; anything else is ignored."""
    request = {"method": "GET", "headers": {"accept": "a"}}
    assert traced(request) is request
    monkeypatch.setenv("TRACEPARENT", PARENT)
    assert traced(request)["headers"] == {"accept": "a", "traceparent": PARENT}
    monkeypatch.setenv("TRACESTATE", "v=1")
    assert traced({})["headers"] == {"traceparent": PARENT, "tracestate": "v=1"}
    monkeypatch.setenv("TRACESTATE", "a\nb: c")
    assert traced({})["headers"] == {"traceparent": PARENT}
    monkeypatch.setenv("TRACEPARENT", "00-x")
    assert traced(request) is request


def test_an_active_span_of_opentelemetry() -> None:
    """The span that is active has precedence; without one, nothing is sent."""
    assert propagate is not None and traced({}) == {}
    with TracerProvider(shutdown_on_exit=False).get_tracer("t").start_as_current_span("s") as span:
        context = span.get_span_context()
        assert (
            traced({})["headers"]["traceparent"]
            == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        )
    assert trace.get_current_span() is trace.INVALID_SPAN and traced({}) == {}


@interop
def test_both_clients_continue_the_trace_in_the_service(make_server: Callable[..., Server], zero: bytes) -> None:
    """The spans of the service are children of the span in which the client was called."""
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("t")
    with receiving() as receiver:
        server: Server = make_server(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint).start()
        parents = []

        async def score() -> None:
            async with AsyncClient(server.url) as client:
                await client.score(zero)

        with tracer.start_as_current_span("blocking") as span, Client(server.url) as client:
            client.score(zero)
            parents.append(span.get_span_context())
        with tracer.start_as_current_span("asyncio") as span:
            asyncio.run(score())
            parents.append(span.get_span_context())
        server.stop()
        found = {(each.trace_id.hex(), each.parent_span_id.hex()) for each in receiver.spans if each.kind == 2}
    assert found == {(f"{each.trace_id:032x}", f"{each.span_id:016x}") for each in parents}
