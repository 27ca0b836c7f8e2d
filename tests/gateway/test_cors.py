"""Pages of allowed origins can read every reply, also those that the gateway returns itself."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import EXAMPLES, ROOT
from tests.gateway.conftest import ORIGIN, Both
from tests.gateway.process import GATEWAY, LIMITS, gateway

PNG = {"content-type": "image/png", "origin": ORIGIN}
ZERO = (EXAMPLES / "zero.png").read_bytes()


def assert_readable(reply: httpx.Response, origin: str = ORIGIN) -> None:
    """Assert that a reply has each header of CORS once."""
    assert reply.headers.get_list("access-control-allow-origin") == [origin]
    (exposed,) = reply.headers.get_list("access-control-expose-headers")
    assert {"Retry-After", "WWW-Authenticate", "X-Request-ID"} <= set(exposed.split(", "))
    if origin != "*":
        assert reply.headers["vary"].count("Origin") == 1


@contextlib.contextmanager
def limited(both: Both, tmp_path: Path, **limits: str) -> Iterator[httpx.Client]:
    """Yield a client of a gateway with other limits, in front of the same service."""
    for file in ("keys/api_keys", "tls/tls.pem", "certificate.pem"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((both.gateway.folder / file).read_bytes())
    with gateway(tmp_path, both.service.port, both.key, **limits) as started, started.client() as client:
        yield client


def test_results_and_rejections_can_be_read(both: Both) -> None:
    """The service's replies keep their headers; 401, 404 and 413 of the gateway get them."""
    with both.gateway.client() as client:
        for status, reply in (
            (200, client.post("/score", content=ZERO, headers=PNG)),
            (401, client.post("/score", content=ZERO, headers={**PNG, "x-api-key": "wrong"})),
            (404, client.get("/metrics", headers=PNG)),
            (413, client.post("/score", content=bytes(70_000), headers=PNG)),
            (422, client.post("/score", content=b"x", headers=PNG)),
        ):
            assert reply.status_code == status
            assert_readable(reply)
        preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
        reply = client.options("/score", headers={**preflight, "x-api-key": ""})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (204, ORIGIN)


def test_pages_of_other_origins_cannot_read(both: Both) -> None:
    """Other origins, similar ones, and programs get no permission; caches learn that the origin matters."""
    with both.gateway.client() as client:
        for origin in ("https://evil.example", f"{ORIGIN}:444", f"{ORIGIN}.evil.example", "null", "none", None):
            headers = {"x-api-key": "wrong", **({} if origin is None else {"origin": origin})}
            reply = client.get("/models", headers=headers)
            assert reply.status_code == 401
            assert "access-control-allow-origin" not in reply.headers
            assert reply.headers["vary"] == "Origin"


def test_too_many_requests_can_be_read(both: Both, tmp_path: Path) -> None:
    """429 has the headers for a list of origins."""
    with limited(both, tmp_path, RATE_PER_KEY="1", CORS_ORIGINS=f"https://a.example {ORIGIN}") as client:
        replies = [client.get("/models", headers={"origin": ORIGIN}) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 429, 429]
    assert_readable(replies[-1])
    assert replies[-1].headers["retry-after"] == "10"


@pytest.mark.parametrize(("origins", "allowed"), [("*", "*"), ("none", None)])
def test_all_or_no_origins(both: Both, tmp_path: Path, origins: str, allowed: str | None) -> None:
    """With `*` every page can read; without the setting no reply of the gateway has a header of CORS."""
    with limited(both, tmp_path, CORS_ORIGINS=origins) as client:
        reply = client.get("/models", headers={"origin": "https://any.example", "x-api-key": "wrong"})
    assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (401, allowed)
    assert "vary" not in reply.headers


@pytest.mark.parametrize(
    ("given", "passed"),
    [("https://A.example,http://localhost:3000", "https://a.example http://localhost:3000"), ("", "none"), ("*", "*")],
)
def test_the_start_script_passes_the_list_on(both: Both, tmp_path: Path, given: str, passed: str) -> None:
    """Commas become blanks, for HAProxy; an empty list allows no origin."""
    script = (GATEWAY / "start").read_text().replace("/tmp/known", str(tmp_path / "known"))
    script = script.replace("/run/keys/api_keys", str(both.gateway.keys)).replace(
        "exec haproxy", "exec printenv CORS_ORIGINS #"
    )
    environment = {**os.environ, **LIMITS, "CORS_ORIGINS": given}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines()[0] == passed


def test_compose_gives_both_the_same_origins() -> None:
    """One variable of .env sets both."""
    compose = (ROOT / "docker-compose.yml").read_text()
    assert re.findall(r"CORS_ORIGINS: \$\{(\w+):", compose) == ["CORS_ORIGINS", "CORS_ORIGINS"]
