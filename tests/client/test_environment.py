"""The environment variables that the client reads: each works, or an error names it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from anomaly import AsyncClient, Client
from anomaly.client import environment, wire
from tests.conftest import EXAMPLES, ROOT

RANGES = "localhost,127.0.0.1,::1,fd07:b51a:cc66:f0::/64"
PROXY = "http://proxy.invalid:3128"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that this machine sets."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in (environment.URL, environment.KEY, environment.KEY_FILE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://[::1]:8000", "https://service.invalid"])
def test_ipv6_addresses_and_ranges_in_no_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """`NO_PROXY` with IPv6 addresses and ranges does not prevent a client."""
    monkeypatch.setenv("NO_PROXY", RANGES)
    Client(url).close()
    AsyncClient(url)


@pytest.mark.parametrize(
    ("no_proxy", "url", "bypassed"),
    [
        (RANGES, "http://127.0.0.1:8000", True),
        (RANGES, "http://[::1]:8000", True),
        (RANGES, "http://[fd07:b51a:cc66:f0::2]", True),
        (RANGES, "http://[fd07:b51a:cc66:f1::2]", False),
        (RANGES, "http://localhost", True),
        (RANGES, "http://host", False),
        ("[::1],[fd07::]/16", "http://[fd07::9]:80", True),
        ("10.0.0.0/8", "http://10.1.2.3", True),
        ("10.0.0.0/8", "http://11.1.2.3", False),
        ("*", "http://host", True),
        ("", "http://host", False),
        ("example.com", "http://www.Example.com", True),
        ("example.com", "http://example.com.", True),
        (".example.com", "http://www.example.com", True),
        ("*.example.com", "http://www.example.com", True),
        ("example.com", "http://anexample.com", False),
        ("example.com:8080", "http://example.com:8080", True),
        ("example.com:8080", "http://example.com", False),
        ("[::1]:8080", "http://[::1]:8080", True),
        ("[::1]:8080", "http://[::1]", False),
        ("https://example.com", "http://example.com", False),
        ("http://example.com", "http://example.com", True),
        (", ,:::,a:b:c", "http://host", False),
    ],
)
def test_the_entries_of_no_proxy(monkeypatch: pytest.MonkeyPatch, no_proxy: str, url: str, bypassed: bool) -> None:
    """An entry is a host, a domain, an address or a range, with a port or without; everything else is ignored."""
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    proxy = environment.proxy_of(httpx.URL(url))
    assert (proxy is None) is bypassed
    assert proxy is None or str(proxy.url) == PROXY


def test_the_proxy_is_that_of_the_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """`HTTPS_PROXY` is for https only, and `ALL_PROXY` for schemes without their own variable."""
    monkeypatch.setenv("HTTPS_PROXY", "secure.invalid:1")
    assert environment.proxy_of(httpx.URL("http://host")) is None
    monkeypatch.setenv("ALL_PROXY", PROXY)
    found = [environment.proxy_of(httpx.URL(f"{scheme}://host")) for scheme in ("http", "https")]
    assert [str(proxy.url) for proxy in found if proxy is not None] == [PROXY, "http://secure.invalid:1"]


@pytest.mark.skipif(find_spec("socksio") is not None, reason="httpx can use SOCKS proxies here")
def test_a_socks_proxy_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that httpx needs for SOCKS, the error names the variable and the package."""
    monkeypatch.setenv("ALL_PROXY", "socks5://user:secret@host:1")
    with pytest.raises(ValueError, match=r"^ALL_PROXY names a SOCKS proxy, which needs the package socksio") as caught:
        environment.proxy_of(httpx.URL("http://host"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["ftp://host:secret@proxy", "http://[::1"])
def test_a_proxy_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A value that is not the URL of a proxy is an error with the variable, and without a password."""
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(ValueError, match="HTTP_PROXY") as caught:
        Client("http://host")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_authorities_that_cannot_be_read_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: str | None
) -> None:
    """A missing or damaged file of authorities is an error with the variable and the path; plain HTTP needs none."""
    path = tmp_path / "cacert.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(name, str(path))
    for client in (Client, AsyncClient):
        with pytest.raises(ValueError, match=f"{name}=.*cacert"):
            client("https://127.0.0.1:1")
    Client("http://127.0.0.1:1").close()


@pytest.mark.process
def test_the_command_names_the_variable(tmp_path: Path) -> None:
    """`anomaly score` with a missing `SSL_CERT_FILE` names it and exits with 2."""
    done = subprocess.run(
        [sys.executable, "-m", "anomaly.cli", "score", str(EXAMPLES / "zero.png"), "--url", "https://127.0.0.1:1"],
        cwd=ROOT, env={"SSL_CERT_FILE": str(tmp_path / "gone.pem"), "PATH": "", "TERMINAL_WIDTH": "200"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "SSL_CERT_FILE" in done.stderr


@pytest.mark.parametrize("key", ["abc\n", " abc", "abc\r\n"])
def test_white_space_around_a_key_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    """The client removes the final newline of a key, wherever the key comes from. Mounted secrets have one."""
    assert wire.options("http://host", key, 1.0)["headers"]["x-api-key"] == "abc"
    monkeypatch.setenv("ANOMALY_KEY", key)
    assert wire.options(None, None, 1.0)["headers"]["x-api-key"] == "abc"
    (tmp_path / "key").write_text(key)
    monkeypatch.setenv("ANOMALY_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("ANOMALY_KEY", "another")
    assert wire.options(None, None, 1.0)["headers"]["x-api-key"] == "abc"


@pytest.mark.parametrize("name", ["ANOMALY_KEY", "ANOMALY_KEY_FILE", "ANOMALY_URL"])
def test_a_variable_with_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An error about a value of the environment names its variable."""
    monkeypatch.setenv(name, "two\nlines")
    with pytest.raises(ValueError, match=name):
        Client()


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a URL both clients use `ANOMALY_URL`, and 127.0.0.1:8000 if it is not set."""
    for value, expected in (("https://host/prefix", "https://host/prefix/"), ("", "http://127.0.0.1:8000")):
        monkeypatch.setenv("ANOMALY_URL", value)
        for client in (Client(), AsyncClient()):
            assert str(client._http.base_url).rstrip("/") == expected.rstrip("/")


def test_no_other_server_gets_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the environment goes to the address of the environment only."""
    monkeypatch.setenv("ANOMALY_KEY", "s3cret")
    assert "x-api-key" not in wire.options("http://elsewhere", None, 1.0)["headers"]
    assert wire.options(None, "own", 1.0)["headers"]["x-api-key"] == "own"
