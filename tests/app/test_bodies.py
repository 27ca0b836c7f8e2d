"""The image in a form: the quick cut decides nothing that the full parser would decide otherwise."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from app.http.multipart import image_of, plain_image_of

HEAD = b'Content-Disposition: form-data; name="file"; filename="a.png"'
BODY = b"--B\r\n%b\r\n\r\n%b\r\n--B--\r\n"


def assert_alike(body: bytes) -> None:
    """What is cut out at once, the parser finds: quotes around the boundary, which mean nothing, leave it to that."""
    found = plain_image_of("multipart/form-data; boundary=B", body) if body else None
    if found is not None:
        assert asyncio.run(image_of('multipart/form-data; boundary="B"', body)) == found


@pytest.mark.parametrize(
    "head",
    [
        HEAD,
        HEAD + b"\r\nContent-Type: image/png",
        HEAD.lower(),
        HEAD.replace(b'"file"', b'"FILE"'),
        HEAD.replace(b"form-data", b"Form-Data"),
        HEAD.replace(b"a.png", b""),
        HEAD.replace(b'"a.png"', b""),
        HEAD.replace(b"a.png", b"C:\\a.png"),
        HEAD.replace(b"a.png", b"\xc3\xa9;\xe9.png"),
        HEAD[:-1],
        HEAD + b'; name="x"',
        HEAD + b'\r\nContent-Disposition: form-data; name="other"',
        HEAD + b"\r\nAAAA",
        HEAD + b"\r\n\x01: x",
        HEAD + b"\r\nContent-Type: ",
        HEAD + b"\r\nContent-Transfer-Encoding: base64",
        HEAD + b"\r\nContent-Type: text/plain; charset=utf-16",
        HEAD + b"".join(b"\r\nA%d: x" % place for place in range(50)),
    ],
)
def test_every_head_means_the_same_with_and_without_quotes(head: bytes) -> None:
    """Whatever stands in the head of a part, the image does not depend on the boundary's quotes."""
    assert_alike(BODY % (head, b"image"))


@given(st.integers(0, len(BODY % (HEAD, b"image"))), st.integers(0, 3), st.binary(max_size=3))
@examples(max_examples=500)
def test_no_change_of_a_form_means_something_else_without_quotes(at: int, cut: int, put: bytes) -> None:
    """However a form is changed, an image that is cut out of it at once is the one that the parser finds."""
    body = BODY % (HEAD, b"image")
    assert_alike(body[:at] + put + body[at + cut :])


@pytest.mark.parametrize("kind", ["", "\r\nContent-Type: image/png"])
@pytest.mark.parametrize(
    "boundary", ["b0undary", "----WebKitFormBoundary7MA4YWxkTrZu0gW", "------------------------d7"]
)
def test_common_clients_need_no_parser(kind: str, boundary: str) -> None:
    """The forms of browsers, curl and httpx are cut at once."""
    body = (BODY % (HEAD + kind.encode(), b"image")).replace(b"--B", b"--" + boundary.encode())
    assert plain_image_of(f"multipart/form-data; boundary={boundary}", body) == b"image"
