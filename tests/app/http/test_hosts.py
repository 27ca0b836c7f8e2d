"""The service rejects requests of web pages whose own host name leads to the service (DNS rebinding)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from app.http.hosts import Hosts
from app.settings import Settings
from tests.app.http.test_fast_path import ask, request, serving
from tests.conftest import Server, running
from tests.requests import PNG, assert_problem

LOCAL = (
    "localhost", "localhost:8000", "LOCALHOST:8000", "page.localhost", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000",
    "[::1]", "10.1.2.3:8000", "192.168.1.7", "api:8000", "reconstruction-anomaly", "",
)  # fmt: skip
"""Hosts of local users, of `docker run -p`, of Kubernetes probes (the address of the pod) and of containers."""
FOREIGN = (
    "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example.",
    "1.2.3.4.5",
    "a@evil.example", "evil.example/", "localhost:8000@evil.example", "evil.example:x", "127.0.0.1 evil.example",
    "..",
)  # fmt: skip


@pytest.mark.parametrize("host", LOCAL)
def test_addresses_and_local_names_are_allowed(host: str) -> None:
    """These hosts are allowed, because a page of another name cannot have them."""
    assert Hosts([]).allows("GET", {b"host": host.encode()})


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_rejected(host: str) -> None:
    """A host that can be the name of a web page is rejected, and so is a malformed host."""
    assert not Hosts(["other.example"]).allows("GET", {b"host": host.encode()})


def test_long_names_are_rejected_and_not_kept() -> None:
    """No host or origin that is longer than a name takes memory."""
    hosts, local = Hosts([]), b"localhost"
    for size in (400, 60_000):
        name = b"a" * size
        assert not hosts.allows("GET", {b"host": name})
        assert not hosts.allows("POST", {b"host": local, b"origin": b"http://" + name})
    assert hosts.allows("POST", {b"host": local, b"origin": b"http://localhost:3000"})
    assert hosts.allows_host.cache_info().currsize == hosts.allows_origin.cache_info().currsize == 1
    assert Hosts(["*"]).allows("POST", {b"host": b"a" * 400})


def test_listed_names_are_allowed() -> None:
    """A listed name is allowed with any port and in any case, and its subdomains are not."""
    hosts = Hosts(["a.example"])
    assert hosts.allows("POST", {b"host": b"A.example:8000", b"origin": b"https://a.example:8000"})
    assert not hosts.allows("POST", {b"host": b"b.a.example"})
    assert Hosts(["*"]).allows("POST", {b"host": b"evil.example", b"origin": b"https://evil.example"})


def test_only_requests_that_cause_work_are_checked_for_their_origin() -> None:
    """A page of another origin must not send POST requests, and the browser does not let it read replies to GET."""
    hosts, host = Hosts([], ["https://page.example"]), (b"host", b"localhost:8000")
    for origin, may_post in (
        (b"https://evil.example", False), (b"null", False), (b"", False), (b"http://localhost:3000", True),
        (b"https://page.example", True), (b"https://page.example:444", False), (b"http://127.0.0.1:8000", True),
        (b"http://127.8.0.1", True), (b"http://[::1]:3000", True), (b"http://page.localhost", True),
        (b"http://203.0.113.9", False), (b"http://[2001:db8::1]", False), (b"http://evil", False),
    ):  # fmt: skip
        assert hosts.allows("POST", dict((host, (b"origin", origin)))) == may_post, origin
        assert hosts.allows("GET", dict((host, (b"origin", origin))))
    assert Hosts([], ["*"]).allows("POST", {b"origin": b"https://evil.example"})
    for own in (b"10.1.2.3", b"api", b"[2001:db8::1]"):
        assert hosts.allows("POST", {b"host": own + b":8000", b"origin": b"http://" + own + b":8000"})
        assert not hosts.allows("POST", {b"host": own + b":8000", b"origin": b"http://10.1.2.4:8000"})


async def test_a_foreign_host_gets_a_problem_on_every_route(client: httpx.AsyncClient, zero: bytes) -> None:
    """Every route rejects a foreign host, including the public routes; a request without Host is allowed."""
    headers = {**PNG, "host": "evil.example:8000"}
    for reply in (
        await client.post("/score", content=zero, headers=headers),
        await client.post("/score/batch", files={"files": zero}, headers={"host": "evil.example"}),
        await client.get("/", headers=headers),
        await client.get("/metrics", headers=headers),
        await client.get("/models", headers=headers),
        await client.post("/score", content=zero, headers={**PNG, "origin": "https://evil.example"}),
    ):
        document = assert_problem(reply, 403, "host-not-allowed")
        assert "ANOMALY_ALLOWED_HOSTS" in document["hint"]
    assert 'route="forbidden",status="403"' in (await client.get("/metrics")).text


async def test_the_fast_path_rejects_too(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, zero: bytes
) -> None:
    """Over a real connection, a complete request of a foreign page is 403."""
    async with serving(make_settings(), monkeypatch) as side:
        for host, status in (("evil.example", 403), ("localhost:8000", 200)):
            reply = await ask(side, request(zero).replace(b"host: x", b"host: " + host.encode()))
            assert (reply.status, reply.headers["x-content-type-options"]) == (status, "nosniff")
        assert side.short == 1


async def test_with_keys_every_name_is_allowed_unless_names_are_listed(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """With API keys, a page without a key gets 401, and a list of host names also applies."""
    keys = tmp_path / "api_keys"
    keys.write_text(f"{'0' * 64} alice\n")
    for hosts, status in (("", 401), ("a.example", 403), ("a.example, evil.example", 401), ("*", 401)):
        async with running(make_settings(api_keys_file=keys, allowed_hosts=hosts)) as client:
            assert (await client.get("/models", headers={"host": "evil.example"})).status_code == status


async def test_every_reply_has_nosniff(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """Once, on results, files, problems, preflight replies and replies without a body."""
    async with running(make_settings(cors_origins="https://a.example")) as client:
        scored = await client.post("/score", content=zero, headers=PNG)
        preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
        for reply in (
            scored,
            await client.get(scored.json()["reconstruction"]),
            await client.post("/score", content=b"x", headers=PNG),
            await client.post("/score/batch", files={"files": zero}),
            await client.post("/score/batch", files={"files": zero}, headers={"accept": "application/x-ndjson"}),
            *[
                await client.get(path)
                for path in (
                    "/", "/docs", "/openapi.json", "/problems", "/problems/not-found", "/page/page.js", "/livez",
                    "/readyz", "/metrics", "/models", "/models/zero-article", "/nothing", "/score",
                    f"/models?{'x' * 2000}",
                    "/models/zero-article/versions/1/report/model-card.md",
                )
            ],
            await client.head("/models"),
            await client.options("/score", headers=preflight),
        ):  # fmt: skip
            assert reply.headers.get_list("x-content-type-options") == ["nosniff"], reply.url


def test_the_process_reads_the_setting(make_server: Callable[..., Server]) -> None:
    """A listed host name is accepted, another one is not; the reply to bytes that are not HTTP has `nosniff` too."""
    server = make_server(ANOMALY_ALLOWED_HOSTS="a.example").start()
    for host, status in (("a.example", 200), (f"localhost:{server.port}", 200), ("b.example", 403)):
        assert server.get("/models", headers={"host": host}).status_code == status
    with server.client() as client:
        assert client.get("/models", headers={"host": "x\x01"}).headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("text", ["https://example.org", "example.org:80", "a b", "a/b", "*.a.example", "-"])
def test_what_is_no_host_name_stops_the_start(text: str) -> None:
    """A value that no Host can equal is an error."""
    with pytest.raises(ValidationError, match="is not a host name"):
        Settings(allowed_hosts=text)
