"""Requests that deviate from RFC 9112 get the replies that docs/http.md lists, straight and through the gateway."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import EXAMPLES, ROOT
from tests.gateway.conftest import Both
from tests.gateway.recorded import exchange

ZERO = (EXAMPLES / "zero.png").read_bytes()
LENGTH = b"Content-Length: %d\r\n" % len(ZERO)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(ZERO), ZERO)


def post(headers: bytes, body: bytes = ZERO) -> bytes:
    """Return a `POST /score` with these further header lines."""
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nX-API-Key: KEY\r\nContent-Type: image/png\r\n"
    return head + headers + b"\r\n" + body


def length(value: str) -> bytes:
    """Return a request that declares a length."""
    return post(f"Content-Length: {value}\r\n".encode())


PLAIN = post(LENGTH)
GET = b"GET /models HTTP/1.1\r\nHost: localhost\r\nX-API-Key: KEY\r\n"
HEAD, _, _ = PLAIN.partition(b"\r\n\r\n")
CASES = {
    "header line continued on the next line (obsolete folding)": post(LENGTH + b"X-A: a\r\n b\r\n"),
    "continuation before the first header": GET.replace(b"Host", b" Host") + b"\r\n",
    "lines that end with LF alone": HEAD.replace(b"\r\n", b"\n") + b"\n\n" + ZERO,
    "CR within a header value": post(LENGTH + b"X-A: a\rb\r\n"),
    "`Content-Length` and `Transfer-Encoding`": post(LENGTH + CHUNKED, CHUNKS),
    "the same `Content-Length` twice": post(LENGTH + LENGTH),
    "two different `Content-Length`": post(LENGTH + b"Content-Length: 5\r\n"),
    "`Content-Length` of 2^64 - 1": length(str(2**64 - 1)),
    "`Content-Length` of 2^64": length(str(2**64)),
    "`Content-Length` of 2^64 and a small number": length(str(2**64 + len(ZERO))),
    "`GET` with a `Content-Length` of 2^64 - 1": GET + b"Content-Length: %d\r\n\r\n" % (2**64 - 1),
    "`Content-Length` with a sign": length(f"+{len(ZERO)}"),
    "`Content-Length` with leading zeros": length(f"{len(ZERO):030}"),
    "empty `Content-Length`": length(""),
    "NUL in a header value": post(LENGTH + b"X-A: a\0b\r\n"),
    "control character in a header value": post(LENGTH + b"X-A: a\x01b\r\n"),
    "byte above 127 in a header value": post(LENGTH + b"X-A: a\xe9b\r\n"),
    "NUL in a header name": post(LENGTH + b"X\0A: b\r\n"),
    "space between name and colon": post(LENGTH + b"X-A : b\r\n"),
    "header line without a colon": post(LENGTH + b"nothing\r\n"),
    "`Transfer-Encoding: gzip, chunked`": post(b"Transfer-Encoding: gzip, chunked\r\n", CHUNKS),
    "`Transfer-Encoding: chunked` twice": post(CHUNKED + CHUNKED, CHUNKS),
    "unknown `Transfer-Encoding`": post(b"Transfer-Encoding: xchunked\r\n", CHUNKS),
    "`Transfer-Encoding` in HTTP/1.0": post(CHUNKED, CHUNKS).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "chunk size line that ends with LF alone": post(CHUNKED, CHUNKS.replace(b"\r\n", b"\n", 1)),
    "chunk size of 2^64 and a small number": post(CHUNKED, b"1%016x\r\n%b\r\n0\r\n\r\n" % (len(ZERO), ZERO)),
    "chunk that does not end with CRLF": post(CHUNKED, b"%x\r\n%bXX0\r\n\r\n" % (len(ZERO), ZERO)),
    "chunk extension": post(CHUNKED, CHUNKS.replace(b"\r\n", b";a=b\r\n", 1)),
    "trailer after a chunked body": post(CHUNKED, CHUNKS[:-2] + b"X-API-Key: other\r\n\r\n"),
    "no `Host`": PLAIN.replace(b"Host: localhost\r\n", b""),
    "two `Host`": post(LENGTH + b"Host: other\r\n"),
    "`Host` with a space": PLAIN.replace(b"localhost", b"localhost other"),
    "complete URL as the target": PLAIN.replace(b"/score", b"http://localhost/score"),
    "fragment in the target": PLAIN.replace(b"/score", b"/score#x"),
    "NUL in the target": PLAIN.replace(b"/score", b"/sc\0ore"),
    "byte above 127 in the target": PLAIN.replace(b"/score", b"/sc\xe9ore"),
    "empty lines before the request": b"\r\n\r\n" + PLAIN,
    "two spaces in the request line": PLAIN.replace(b"POST /", b"POST  /"),
    "tab in the request line": PLAIN.replace(b"POST /", b"POST\t/"),
    "version HTTP/1.2": PLAIN.replace(b"HTTP/1.1", b"HTTP/1.2"),
    "version HTTP/2.0 in a request line": PLAIN.replace(b"HTTP/1.1", b"HTTP/2.0"),
    "no version": b"GET /livez\r\n\r\n",
    "bytes that are not HTTP": b"nothing\r\n\r\n",
}
ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| (?P<service>\d{3}) \| (?P<gateway>\d{3}(?: HTML)?) \| (?P<reason>[^|]*)\|$", re.MULTILINE
)
ROWS = {row["name"]: row for row in ROW.finditer((ROOT / "docs" / "http.md").read_text())}


def test_the_page_lists_every_case() -> None:
    """The table has a row for each case, and a reason wherever a deviation is not rejected on both sides."""
    assert list(ROWS) == list(CASES)
    for row in ROWS.values():
        if "200" in (row["service"], row["gateway"]):
            assert row["reason"].strip(), row["name"]


@pytest.mark.parametrize("name", CASES)
def test_a_deviation_gets_the_documented_reply(both: Both, name: str) -> None:
    """Status and media type are those of the table; an accepted request is scored, a rejected one is a problem."""
    for gateway, expected in ((False, ROWS[name]["service"]), (True, ROWS[name]["gateway"])):
        head, body = exchange(both, CASES[name].replace(b"KEY", both.key.encode()), gateway=gateway, timeout=5)
        status = head.split(b" ", 2)[1].decode() if head else "no reply"
        kind = re.search(rb"(?i)^content-type: (\S+?)\r?$", head, re.MULTILINE)
        shown = f"{status} HTML" if kind and kind[1] == b"text/html" else status
        assert shown == expected, ("gateway" if gateway else "service", head, body)
        if status == "200":
            assert "mse" in json.loads(body)
        elif kind and kind[1] != b"text/html":
            assert json.loads(body)["type"] in ("/problems/malformed-request", "/problems/body-too-large")


@pytest.mark.parametrize(
    ("url", "rejected"),
    [("http://localhost", b"404"), ("http://localhost?x=1", b"400"), ("http://localhost:8000?", b"400")],
)
def test_a_complete_url_without_a_path_is_the_page(both: Both, url: str, rejected: bytes) -> None:
    """The path of such a target is `/` at the service, with `GET` and with `OPTIONS`; the gateway rejects it."""
    get = GET.replace(b"/models", url.encode()).replace(b"KEY", both.key.encode()) + b"\r\n"
    for request, gateway, status in (
        (get, False, b"200"),
        (get.replace(b"GET", b"OPTIONS"), False, b"405"),
        (get, True, rejected),
    ):
        head, _ = exchange(both, request, gateway=gateway, timeout=5)
        assert head.split(b" ", 2)[1] == status, head


def test_the_gateway_itself_rejects_what_the_service_would_read_differently(both: Both) -> None:
    """Control characters and huge lengths do not reach the service: the replies are the gateway's, without a detail."""
    for name in ("NUL in a header value", "control character in a header value", "`Content-Length` of 2^64"):
        _, body = exchange(both, CASES[name].replace(b"KEY", both.key.encode()), gateway=True)
        assert "detail" not in json.loads(body), name
