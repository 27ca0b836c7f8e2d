"""Pages of allowed origins may call the service from a browser (CORS)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from app.http.cors import Cors
from app.settings import Settings
from tests.conftest import ROOT, Server, running

ORIGIN = "http://localhost:3000"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "content-type,x-api-key",
}
PNG = {"content-type": "image/png"}


def of_cors(reply: httpx.Response) -> dict[str, str]:
    """Return the CORS headers of a reply."""
    return {name: value for name, value in reply.headers.items() if name.startswith("access-control-")}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Return a file with an API key that no test uses."""
    file = tmp_path / "api_keys"
    file.write_text(f"{'0' * 64} alice\n")
    return file


async def test_a_preflight_request_needs_no_key(make_settings: Callable[..., Settings], keys: Path) -> None:
    """The reply allows the method and the headers that the browser asks for, on every path."""
    async with running(make_settings(cors_origins=f"https://example.org, {ORIGIN}", api_keys_file=keys)) as client:
        for path in ("/score", "/score/batch", "/models", "/reconstruction/x"):
            reply = await client.options(path, headers=PREFLIGHT)
            assert (reply.status_code, reply.content) == (204, b"")
            assert reply.headers["access-control-allow-origin"] == ORIGIN
            assert "POST" in reply.headers["access-control-allow-methods"]
            assert reply.headers["access-control-allow-headers"] == "content-type,x-api-key"
            assert "Origin" in reply.headers["vary"]
            assert reply.headers["x-request-id"]
        assert 'route="preflight",status="204"' in (await client.get("/metrics")).text


@pytest.mark.parametrize("headers", [{**PREFLIGHT, "origin": "http://evil.example"}, {"origin": ORIGIN}])
async def test_other_options_requests_are_answered_as_before(
    make_settings: Callable[..., Settings], headers: dict[str, str]
) -> None:
    """A preflight request of another origin, and OPTIONS without a preflight, are 405."""
    async with running(make_settings(cors_origins=ORIGIN)) as client:
        reply = await client.options("/score", headers=headers)
        assert reply.status_code == 405
        assert ("access-control-allow-origin" in reply.headers) == (headers["origin"] == ORIGIN)


async def test_cors_is_off_by_default(client: httpx.AsyncClient, zero: bytes) -> None:
    """Without the setting no response has a header of CORS."""
    assert (await client.options("/score", headers=PREFLIGHT)).status_code == 405
    reply = await client.post("/score", content=zero, headers={**PNG, "origin": ORIGIN})
    assert (reply.status_code, of_cors(reply)) == (200, {})
    assert "vary" not in reply.headers


async def test_replies_can_be_read_by_allowed_origins(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """Results and problems of all paths name the origin and the headers that a page may read."""
    async with running(make_settings(cors_origins=ORIGIN)) as client:
        for origin in (ORIGIN, "http://evil.example", None):
            headers = {**PNG, **({"origin": origin} if origin else {})}
            for reply in (
                await client.post("/score", content=zero, headers=headers),
                await client.post("/score", content=b"x", headers=headers),
                await client.post("/score/batch", files={"files": zero}, headers=headers and {"origin": origin or ""}),
                await client.get("/models", headers=headers),
                await client.get(f"/models?{'x' * 2000}", headers=headers),
                await client.get("/nothing", headers=headers),
            ):
                assert reply.headers.get("access-control-allow-origin") == (ORIGIN if origin == ORIGIN else None)
                assert "Origin" in reply.headers["vary"]
                if origin == ORIGIN:
                    exposed = reply.headers["access-control-expose-headers"]
                    assert "X-Request-ID" in exposed and "Server-Timing" in exposed


def test_the_fast_path_adds_the_headers(make_server: Callable[..., Server], zero: bytes) -> None:
    """The process reads the setting; a score over a real connection, which takes the fast path, has the headers."""
    server = make_server(ANOMALY_CORS_ORIGINS="*").start()
    with server.client() as client:
        reply = client.post("/score", content=zero, headers={**PNG, "origin": ORIGIN})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")
        assert "Server-Timing" in reply.headers["access-control-expose-headers"]
        assert client.options("/score", headers=PREFLIGHT).status_code == 204


def test_all_origins_need_no_vary() -> None:
    """With `*` the headers do not depend on the origin."""
    cors = Cors(["*"])
    assert cors.headers(None) == cors.headers(b"http://any.example")
    assert not any(name == b"vary" for name, _ in cors.headers(None))


def test_a_preflight_cannot_inject_headers() -> None:
    """Requested headers are repeated only if they are names."""
    asked = {b"origin": b"http://a", b"access-control-request-method": b"POST"}
    answer = Cors(["http://a"]).preflight({**asked, b"access-control-request-headers": b"x y; z"})
    assert answer is not None
    assert b"access-control-allow-headers" not in dict(answer)


@pytest.mark.parametrize("text", ["example.org", "https://example.org/", "https://a/b", "null", "https://*.a"])
def test_what_is_no_origin_is_rejected(text: str) -> None:
    """A value that no browser sends as Origin stops the start."""
    with pytest.raises(ValidationError, match="is not an origin"):
        Settings(cors_origins=text)


def test_origins_are_read_as_browsers_send_them() -> None:
    """Spaces and capitals do not matter."""
    assert Settings(cors_origins=" https://Example.org:8443 ,http://[::1]:3000,").cors_origins == (
        "https://example.org:8443,http://[::1]:3000"
    )


def test_the_gateway_passes_preflight_requests_on() -> None:
    """The gateway needs no key for them; the service decides about the origin."""
    configuration = (ROOT / "deploy" / "gateway" / "haproxy.cfg").read_text()
    rule = re.search(r"acl preflight (.*)\n", configuration)
    assert rule is not None
    assert rule[1].startswith("method OPTIONS")
    assert "set-var(txn.public) bool(true) if preflight { req.hdr(Origin) -m found }" in configuration
    allowing = configuration.index("if preflight {")
    assert allowing < configuration.index("deny deny_status 401 if !public")
    for route in re.findall(
        r"method: (\w+)", (ROOT / "deploy/kubernetes/components/gateway/httproute.yaml").read_text()
    ):
        assert route == "POST"  # only for `fit=mnist`
