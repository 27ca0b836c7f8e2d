"""The OpenAPI document has an example of every reply, and each example is valid."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from app.http import examples
from app.settings import Settings
from tests import pngs
from tests.conftest import running
from tests.requests import raw

Reply = tuple[str, str, str, dict[str, Any]]
"""Operation, status, media type, and the description of the body."""


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    """Return the document of the service."""
    found: dict[str, Any] = (await client.get("/openapi.json")).json()
    return found


def replies(document: dict[str, Any]) -> Iterator[Reply]:
    """Yield every reply with a body."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, reply in operation["responses"].items():
                for media_type, content in reply.get("content", {}).items():
                    yield operation["operationId"], status, media_type, content


def shown(content: dict[str, Any]) -> list[Any]:
    """Return the examples of a body."""
    many = [each["value"] for each in content.get("examples", {}).values()]
    return [content["example"], *many] if "example" in content else many


async def test_every_reply_has_an_example(document: dict[str, Any]) -> None:
    """Replies as JSON and plain text have an example. Binary replies and pages have a description instead."""
    missing = []
    for operation, status, media_type, content in replies(document):
        is_binary = content["schema"].get("format") == "binary"
        if is_binary and content["schema"]["description"]:
            continue
        if media_type != "text/html" and not shown(content):
            missing.append((operation, status, media_type))
    assert missing == []
    assert all(reply.get("content") for reply in _described(document))


async def test_a_client_that_reads_it_while_it_is_built_gets_the_whole_document(
    make_settings: Callable[..., Settings],
    document: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The examples arrive slowly, from a pipe: the second client waits until the first has built the document."""
    recorded, pipe = examples.FILE.read_bytes(), tmp_path / "examples.json"
    os.mkfifo(pipe)
    monkeypatch.setattr(examples, "FILE", pipe)
    async with running(make_settings()) as fresh:
        first = asyncio.create_task(fresh.get("/openapi.json"))
        with await asyncio.to_thread(pipe.open, "wb") as writer:  # returns when the file is read
            second = asyncio.create_task(fresh.get("/openapi.json"))
            early = (await asyncio.wait({second}, timeout=0.5))[0]
            await asyncio.to_thread(writer.write, recorded)
        assert not early
        assert (await first).json() == (await second).json() == document


def _described(document: dict[str, Any]) -> list[dict[str, Any]]:
    found = [each for operations in document["paths"].values() for each in operations.values()]
    return [reply for operation in found for reply in operation["responses"].values()]


async def test_every_example_is_valid(document: dict[str, Any]) -> None:
    """Each example of JSON has the schema of its reply; each line of NDJSON has that of an item."""
    checked = 0
    for operation, status, media_type, content in replies(document):
        schema = content["schema"]
        for example in shown(content):
            if media_type == "application/x-ndjson":
                schema = {"$ref": "#/components/schemas/BatchItem"}
                parts = [json.loads(line) for line in example.splitlines()]
            elif "json" in media_type:
                parts = [example]
            else:
                continue
            validator = Draft202012Validator({**schema, "components": document["components"]})
            for part in parts:
                assert [error.message for error in validator.iter_errors(part)] == [], (operation, status)
                checked += 1
    assert checked > 100


async def test_examples_of_metrics_can_be_parsed(document: dict[str, Any]) -> None:
    """The examples of both formats of metrics are valid for the parser of their format."""
    content = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    for media_type, parse in (
        ("text/plain", text_string_to_metric_families),
        ("application/openmetrics-text", openmetrics.text_string_to_metric_families),
    ):
        assert next(iter(parse(content[media_type]["example"]))).name == "anomaly_http_requests"


async def test_recorded_replies_have_the_members_of_real_ones(client: httpx.AsyncClient) -> None:
    """Run python -m benchmarks.write_openapi_examples if a reply has got a member that its example does not have."""
    recorded = json.loads(examples.FILE.read_text())
    score = (await raw(client, pngs.plain())).json()
    real = {
        "score": score,
        "reconstruction": (await client.get(score["reconstruction"], headers={"accept": "application/json"})).json(),
        "models": (await client.get("/models")).json(),
        "model": (await client.get("/models/zero-article")).json(),
        "validity": (await client.get("/models/zero-article/validity")).json(),
        "readyz": (await client.get("/readyz")).json(),
        "v2_server": (await client.get("/v2")).json(),
        "v2_model": (await client.get("/v2/models/zero-article")).json(),
        "v2_config": (await client.get("/v2/models/zero-article/config")).json(),
    }
    for operation, reply in real.items():
        assert set(recorded[operation]["200"]["application/json"]) == set(reply), operation
