"""Random forms get the same reply: on `/score` and `/score/batch`, by both paths, complete or split anywhere."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import h11
import hypothesis
import pytest
from hypothesis import strategies as st

from app.settings import Settings
from tests.app.http.test_fast_path import Side, serving
from tests.conftest import EXAMPLES
from tests.waiting import until

ZERO = (EXAMPLES / "zero.png").read_bytes()
COUNT = int(os.environ.get("FORM_EXAMPLES", "50"))
"""Number of random forms per test."""
UNHURRIED = hypothesis.settings(
    max_examples=COUNT, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
TOKEN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'+_-."
SPECIAL = "()/:=?, "


@dataclass(frozen=True)
class RandomForm:
    """A form and how it is sent.

    Attributes:
        boundary: between its parts.
        kind: the header Content-Type.
        text: headers and content of each part, `FIELD` in place of the name of the file's field.
        preamble: text before the first boundary.
        epilogue: text behind the last boundary.
        encoding: Content-Encoding, or empty.
        chunks: number of bytes per chunk, or 0 for Content-Length.
        cuts: places at which the request is split, as shares of its length.
        alpha: the value of the parameter, or None.
    """

    boundary: bytes
    kind: str
    text: tuple[bytes, ...]
    preamble: bytes
    epilogue: bytes
    encoding: str
    chunks: int
    cuts: tuple[float, ...]
    alpha: float | None

    def body(self, field: bytes) -> bytes:
        """Return the form, with its file in this field."""
        delimiter = b"--" + self.boundary
        parts = b"".join(delimiter + b"\r\n" + text.replace(b"FIELD", field) + b"\r\n" for text in self.text)
        return self.preamble + parts + delimiter + b"--" + self.epilogue

    def request(self, path: str, body: bytes) -> bytes:
        """Return the request as it goes over the wire."""
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {self.kind}"]
        if self.encoding:
            lines.append(f"Content-Encoding: {self.encoding}")
            body = gzip.compress(body) if self.encoding == "gzip" else zlib.compress(body)
        if self.chunks:
            lines.append("Transfer-Encoding: chunked")
            pieces = [body[start : start + self.chunks] for start in range(0, len(body), self.chunks)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        else:
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    def split(self, request: bytes) -> list[bytes]:
        """Return a request in pieces."""
        places = sorted({int(cut * len(request)) for cut in self.cuts} - {0, len(request)})
        return [request[start:end] for start, end in zip([0, *places], [*places, len(request)], strict=True)]


def cased(name: str) -> st.SearchStrategy[str]:
    """Return a strategy of spellings of a header name."""
    return st.sampled_from((name, name.lower(), name.upper()))


@st.composite
def parts(draw: st.DrawFn, disposition: str, types: tuple[str, ...], content: bytes) -> bytes:
    """Draw a part: its headers in any order and spelling, then its content."""
    space = draw(st.sampled_from((" ", "", "\t", "  ")))
    lines = [f"{draw(cased('Content-Disposition'))}:{space}{disposition}"]
    if kind := draw(st.sampled_from(types)):
        lines.append(f"{draw(cased('Content-Type'))}: {kind}")
    if encoding := draw(st.sampled_from(("", "binary", "8bit", "7bit", "BINARY"))):
        lines.append(f"{draw(cased('Content-Transfer-Encoding'))}: {encoding}")
    if draw(st.booleans()):
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*draw(st.permutations(lines)), "", ""]).encode() + content


def named(name: str) -> st.SearchStrategy[str]:
    """Return a strategy of ways to write the name of a field."""
    return st.sampled_from((f'form-data; name="{name}"', f"form-data; name={name}", f'Form-Data;name="{name}"'))


@st.composite
def forms(draw: st.DrawFn) -> RandomForm:
    """Draw a valid form with one file, which both routes accept."""
    special = draw(st.booleans())
    boundary = draw(st.text(TOKEN + (SPECIAL if special else ""), min_size=1, max_size=70)).strip() or "b"
    quoted = special or draw(st.booleans())
    parameter = f'{draw(cased("boundary"))}="{boundary}"' if quoted else f"{draw(cased('boundary'))}={boundary}"
    others = draw(st.sampled_from(((), ("charset=utf-8",))))
    kind = draw(st.sampled_from(("; ", ";", " ;  "))).join(
        [
            draw(st.sampled_from(("multipart/form-data", "Multipart/Form-Data"))),
            *draw(st.permutations([parameter, *others])),
        ]
    )
    alpha = draw(st.sampled_from((None, 0.05, 0.2)))
    values = {"alpha": alpha, "model": draw(st.sampled_from((None, "zero-article", "zero-article@1")))}
    text_types = ("", "text/plain", "text/plain; charset=UTF-8")
    fields = [
        draw(parts(draw(named(name)), text_types, str(value).encode()))
        for name, value in values.items()
        if value is not None
    ]
    names = ("", '; filename="a.png"', "; filename=a.png", "; filename*=UTF-8''z%C3%A9ro.png", '; filename="b\\"c.png"')
    disposition = draw(named("FIELD")) + draw(st.sampled_from(names)) + draw(st.sampled_from(("", ";")))
    file = draw(parts(disposition, ("", "image/png", "application/octet-stream"), ZERO))
    words = st.text("abc -:\n", max_size=40).map(lambda text: text.replace("\n", "\r\n").encode())
    preamble = draw(words.filter(lambda text: f"--{boundary}".encode() not in text))
    return RandomForm(
        boundary=boundary.encode(),
        kind=kind,
        text=(*draw(st.permutations(fields)), file),
        preamble=preamble and preamble + b"\r\n",
        epilogue=draw(st.sampled_from((b"\r\n", b"", b"\r\nabc", b"\r\n\r\n--x--\r\n"))),
        encoding=draw(st.sampled_from(("", "", "gzip", "deflate"))),
        chunks=draw(st.sampled_from((0, 0, 1, 100, 4096))),
        cuts=tuple(draw(st.lists(st.floats(0, 1), max_size=5))),
        alpha=alpha,
    )


@pytest.fixture
async def side(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Side]:
    """Yield an application with real connections."""
    async with serving(make_settings(), monkeypatch) as side:
        yield side


async def send(side: Side, pieces: list[bytes]) -> tuple[int, Any]:
    """Send a request piece by piece, each read by the server before the next one, and return status and document."""
    known, sent = len(side.protocols), 0
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    parser, status, body = h11.Connection(h11.CLIENT), 0, b""
    parser.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    try:
        async with asyncio.timeout(30):
            for piece in pieces:
                if sent:
                    await until(lambda: len(side.protocols) > known)
                    await side.has_read(sent)
                writer.write(piece)
                sent += len(piece)
            while not isinstance(event := parser.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    parser.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += event.data
    finally:
        writer.close()
    document = json.loads(body)
    for item in (document, *document.get("items", ())):
        for name in ("id", "reconstruction", "instance"):
            item.pop(name, None)
    return status, document


async def everywhere(side: Side, form: RandomForm, path: str, body: bytes) -> tuple[int, Any]:
    """Return the reply of a route, and assert that paths and splits make no difference."""
    request = form.request(path, body)
    answer = await send(side, [request])
    assert await send(side, form.split(request)) == answer
    side.general = True
    try:
        assert await send(side, [request]) == answer
        assert await send(side, form.split(request)) == answer
    finally:
        side.general = False
    return answer


@UNHURRIED
@hypothesis.given(form=forms())
async def test_a_valid_form_has_one_answer(side: Side, form: RandomForm) -> None:
    """Both routes give the score of the image under the parameters of the form, however the form is sent."""
    status, single = await everywhere(side, form, "/score", form.body(b"file"))
    assert status == 200, single
    status, batch = await everywhere(side, form, "/score/batch", form.body(b"files"))
    assert status == 200, batch
    (item,) = batch["items"]
    assert {name: item[name] for name in ("mse", "is_anomaly")} == {
        name: single[name] for name in ("mse", "is_anomaly")
    }
    assert single["alpha"] == batch["alpha"]
    assert form.alpha is None or single["alpha"] == form.alpha


@UNHURRIED
@hypothesis.given(
    form=forms(), place=st.floats(0, 1), change=st.sampled_from((b"", b"\n", b"\r\n", b"--", b"\0", b'"'))
)
async def test_a_damaged_form_has_one_answer(side: Side, form: RandomForm, place: float, change: bytes) -> None:
    """A byte that is replaced by others gives the same answer, score or problem, by each path and for each split."""
    for path, field in (("/score", b"file"), ("/score/batch", b"files")):
        body = form.body(field)
        at = int(place * len(body))
        status, document = await everywhere(side, form, path, body[:at] + change + body[at + 1 :])
        assert status in (200, 400, 404, 413, 415, 422), document  # 404: the name of the model is damaged
