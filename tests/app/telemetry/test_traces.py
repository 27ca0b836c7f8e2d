"""Traces: spans arrive at a real OTLP receiver, with the caller's trace, links to micro-batches, and ids in the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from app.settings import Settings
from app.telemetry import traces
from app.telemetry.traces import Traces, TracesError
from tests import pngs
from tests.conftest import ROOT, Server, running
from tests.infer_requests import json_request
from tests.otlp import Receiver, attributes, receiving
from tests.requests import raw

SERVER, INTERNAL = 2, 1


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Yield a receiver of spans."""
    with receiving() as found:
        yield found


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of OpenTelemetry that the shell may have set."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def parent(number: int, flags: str = "01") -> tuple[str, str]:
    """Return trace and span of a caller."""
    return f"{number + 1:032x}", f"{number + 100:016x}"


def traceparent(number: int, flags: str = "01") -> dict[str, str]:
    """Return the headers of a caller's trace."""
    return {"traceparent": "00-{}-{}-{}".format(*parent(number), flags), "tracestate": f"vendor=t{number}"}


@pytest.mark.process
def test_eight_traces_and_one_batch_with_eight_links(
    make_server: Callable[..., Server], receiver: Receiver, zero: bytes
) -> None:
    """Eight callers in one micro-batch: a span in each of their traces, and one span with links to the eight."""
    server: Server = make_server(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        ANOMALY_MICROBATCH_MAX_SIZE="8",
        ANOMALY_MICROBATCH_MAX_DELAY_MS="5000",
        ANOMALY_DEADLINE_MS="20000",
    ).start()

    def score(number: int) -> str:
        headers = {"content-type": "image/png", "x-request-id": f"r{number}", **traceparent(number)}
        return server.post("/score", content=zero, headers=headers).json()["id"]

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(score, range(8)))) == 8
    server.get("/models", headers=traceparent(50))
    server.get("/models", headers=traceparent(51, flags="00"))  # the caller does not record this one
    server.get("/livez", headers=traceparent(52))
    server.get("/v2/health/ready", headers=traceparent(53))
    server.get("/metrics", headers=traceparent(54))
    server.get("/nothing")
    assert server.stop() == 0

    spans = receiver.spans
    scores = [span for span in spans if span.name == "POST /score"]
    assert {(each.trace_id.hex(), each.parent_span_id.hex()) for each in scores} == {parent(n) for n in range(8)}
    assert {each.kind for each in scores} == {SERVER}
    assert sorted(each.trace_state for each in scores) == [f"vendor=t{n}" for n in range(8)]
    (batch,) = [span for span in spans if span.name == "micro-batch"]
    assert not batch.parent_span_id and batch.trace_id not in {each.trace_id for each in scores}
    assert {(link.trace_id, link.span_id) for link in batch.links} == {(each.trace_id, each.span_id) for each in scores}
    assert len(batch.links) == 8
    for each in scores:
        assert [(link.trace_id, link.span_id) for link in each.links] == [(batch.trace_id, batch.span_id)]
        assert attributes(each)["http.response.status_code"] == 200
        assert attributes(each)["anomaly.model"] == "zero"
        assert attributes(each)["anomaly.forward_us"] > 0
        assert (
            each.start_time_unix_nano < batch.start_time_unix_nano < batch.end_time_unix_nano <= each.end_time_unix_nano
        )
    stages = {span.name: span for span in spans if span.parent_span_id == batch.span_id}
    assert sorted(stages) == ["forward", "store"]
    assert stages["forward"].end_time_unix_nano <= stages["store"].start_time_unix_nano
    assert attributes(batch) == {"anomaly.images": 8, "anomaly.model": "zero", "anomaly.version": 1}

    others = [span for span in spans if span.kind == SERVER and span not in scores]
    assert {(each.name, each.trace_id.hex()) for each in others if each.name != "GET unknown"} == {
        ("GET /models", parent(50)[0])
    }
    (nothing,) = [each for each in others if each.name == "GET unknown"]
    assert not nothing.parent_span_id and attributes(nothing)["anomaly.problem"] == "/problems/not-found"
    assert receiver.resource["service.name"] == "reconstruction-anomaly"

    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    logged = {line["request_id"]: line.get("trace_id") for line in lines if line["event"] == "request"}
    assert [logged[f"r{n}"] for n in range(8)] == [parent(n)[0] for n in range(8)]


async def test_images_of_one_tensor_share_a_link(make_settings: Callable[..., Settings], receiver: Receiver) -> None:
    """A tensor request of several images is one request: the micro-batch has one link to it."""
    recorded = Traces(OTLPSpanExporter(f"{receiver.endpoint}/v1/traces"), Resource.create(), None, "1")
    async with running(make_settings(), traces=recorded) as client:
        path = "/v2/models/zero-article/infer"
        reply = await client.post(path, json=json_request(pngs.gradient()[None].repeat(4, 0)), headers=traceparent(1))
        assert reply.status_code == 200
        assert (await client.post(path, content=b"", headers=traceparent(2))).status_code == 400
    (batch,) = [span for span in receiver.spans if span.name == "micro-batch"]
    assert [link.trace_id.hex() for link in batch.links] == [parent(1)[0]]
    assert attributes(batch)["anomaly.images"] == 4
    requests = [span for span in receiver.spans if span.kind == SERVER]
    assert sorted(attributes(span)["http.response.status_code"] for span in requests) == [200, 400]


async def test_server_errors_are_errors_of_their_spans(
    make_settings: Callable[..., Settings], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 5xx sets the status of the span; a 4xx is the fault of the caller and does not."""
    from app.inference.detector import Detector

    recorded = Traces(OTLPSpanExporter(f"{receiver.endpoint}/v1/traces"), Resource.create(), None, "1")
    async with running(make_settings(), traces=recorded) as client:
        monkeypatch.setattr(Detector, "draw", lambda *_: 1 / 0)
        assert (await raw(client, pngs.plain())).status_code == 500
        assert (await raw(client, b"no png")).status_code == 422
    codes = {attributes(span)["http.response.status_code"]: span.status.code for span in receiver.spans}
    assert codes == {500: 2, 422: 0}


def test_a_span_contains_only_its_own_values(receiver: Receiver) -> None:
    """Spans of the same route and status share no value, link, parent or state, of whatever type a fact is."""
    recorded = Traces(OTLPSpanExporter(f"{receiver.endpoint}/v1/traces"), Resource.create(), None, "1")
    first, second = recorded.begin({k.encode(): v.encode() for k, v in traceparent(1).items()}), recorded.begin({})
    assert first is not None and second is not None
    recorded.micro_batch([first, None, first], [("forward", 1.0, 2.0)], images=3)
    for context, facts in ((first, {"a": 1, "b": "x", "c": 0.5}), (second, {"a": None, "b": True, "c": ["y"]})):
        recorded.request(context, method="POST", route="/score", status=200, started=0.0, facts=facts)
    assert recorded.close(5)
    one, other = [span for span in receiver.spans if span.kind == SERVER]
    (batch,) = [span for span in receiver.spans if span.name == "micro-batch"]
    shown = [
        {name: each for name, each in found.items() if name.startswith("anomaly.")}
        for found in map(attributes, (one, other))
    ]
    assert shown == [
        {"anomaly.a": 1, "anomaly.b": "x", "anomaly.c": 0.5},
        {"anomaly.a": None, "anomaly.b": True, "anomaly.c": "['y']"},
    ]
    assert (one.trace_id.hex(), one.parent_span_id.hex()) == parent(1) and one.trace_state == "vendor=t1"
    assert (other.trace_id, other.parent_span_id, other.trace_state) == (second.trace_id, b"", "")
    assert [link.span_id for link in one.links] == [batch.span_id] and not other.links
    assert [link.span_id for link in batch.links] == [one.span_id]


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        ("00-" + "a" * 32 + "-" + "b" * 16 + "-01", True),
        ("01-" + "a" * 32 + "-" + "b" * 16 + "-01-later", True),
        ("00-" + "a" * 32 + "-" + "b" * 16 + "-01-later", False),
        ("ff-" + "a" * 32 + "-" + "b" * 16 + "-01", False),
        ("00-" + "0" * 32 + "-" + "b" * 16 + "-01", False),
        ("00-" + "a" * 32 + "-" + "0" * 16 + "-01", False),
        ("00-" + "A" * 32 + "-" + "b" * 16 + "-01", False),
        ("", False),
    ],
)
def test_a_trace_begins_here_unless_the_header_is_valid(receiver: Receiver, header: str, valid: bool) -> None:
    """An invalid `traceparent` is ignored, as W3C Trace Context demands."""
    recorded = Traces(OTLPSpanExporter(f"{receiver.endpoint}/v1/traces"), Resource.create(), None, "1")
    found = recorded.begin({b"traceparent": header.encode()})
    assert found is not None
    assert (found.hex_id == "a" * 32, found.parent_id == b"\xbb" * 8) == (valid, valid)
    assert recorded.close(5)


def test_a_long_trace_state_is_not_kept(receiver: Receiver) -> None:
    """A `tracestate` above 512 characters takes no memory until its span is exported."""
    recorded = Traces(OTLPSpanExporter(f"{receiver.endpoint}/v1/traces"), Resource.create(), None, "1")
    parent = ("00-" + "a" * 32 + "-" + "b" * 16 + "-01").encode()
    for size, kept in ((512, 512), (513, 0), (60_000, 0)):
        found = recorded.begin({b"traceparent": parent, b"tracestate": b"v=" + b"t" * (size - 2)})
        assert found is not None
        assert len(found.state) == kept
    assert recorded.close(5)


def test_a_sampler_decides(receiver: Receiver) -> None:
    """A request that the sampler drops has no context, and so costs nothing further."""
    recorded = Traces(OTLPSpanExporter(f"{receiver.endpoint}/v1/traces"), Resource.create(), ALWAYS_OFF, "1")
    assert recorded.begin({}) is None
    assert recorded.begin({b"traceparent": traceparent(1)["traceparent"].encode()}) is None
    assert recorded.close(5)


@pytest.mark.parametrize(
    ("variables", "requested"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "a"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_traces_are_off_unless_variables_ask_for_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], requested: bool
) -> None:
    """The standard variables decide, and only those about traces."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert traces.is_requested() is requested
    if not requested:
        assert traces.from_environment("1") is None


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "OTEL_TRACES_EXPORTER=jaeger"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "5000"}, "max_export_batch_size"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_SCHEDULE_DELAY": "0"}, "OTEL_BSP_... has a value"),
    ],
)
def test_what_cannot_be_exported_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    """If traces are configured but cannot be exported, the start fails with the reason."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TracesError, match=words):
        traces.check()


@pytest.mark.process
def test_nothing_of_opentelemetry_is_imported_while_it_is_off() -> None:
    """Off, the SDK takes neither time nor memory at start."""
    code = (
        "import sys, app.main; from app.telemetry import traces;"
        "assert traces.from_environment('1') is None;"
        "sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_collector_that_does_not_answer_delays_no_shutdown() -> None:
    """`close` returns within its time limit, and returns False if spans were lost."""
    recorded: Any = Traces(OTLPSpanExporter("http://127.0.0.1:9/v1/traces", timeout=20), Resource.create(), None, "1")
    context = recorded.begin({})
    recorded.request(context, method="GET", route="/", status=200, started=0.0, facts={})
    assert recorded.close(0.2) is False
