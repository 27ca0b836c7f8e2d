"""Bodies: their time limit, their content encoding, and the forms (RFC 7578) in them."""

from __future__ import annotations

import asyncio
import gzip
import random
import time
import zlib
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from app.http.bodies import BodyReader, decoded, decoded_pieces
from app.http.forms import FormReader
from app.http.multipart import Form, chunks, plain_image_of, read_form
from app.problems import (
    BodyTimeout,
    BodyTooLarge,
    EmptyBody,
    InvalidParameter,
    MalformedMultipart,
    MalformedRequest,
    MissingFile,
    Problem,
    TooManyFiles,
    UnsupportedEncoding,
    UnsupportedMediaType,
)
from tests import pngs
from tests.waiting import advance, virtual_time

HEAD = b'Content-Disposition: form-data; name="file"; filename="a.png"'
BODY = b"--B\r\n%b\r\n\r\n%b\r\n--B--\r\n"


def assert_alike(body: bytes) -> None:
    """Assert that the fast extraction finds nothing or the same image as the parser, which quoted boundaries select."""
    found = plain_image_of("multipart/form-data; boundary=B", body) if body else None
    if found is not None:
        assert read_form('multipart/form-data; boundary="B"', body).image == found


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
    """For any head of a part, the image does not depend on the quotes of the boundary."""
    assert_alike(BODY % (head, b"image"))


@given(st.integers(0, len(BODY % (HEAD, b"image"))), st.integers(0, 3), st.binary(max_size=3))
@examples(max_examples=500)
def test_no_change_of_a_form_means_something_else_without_quotes(at: int, cut: int, put: bytes) -> None:
    """For any change of a form, the fast extraction of an image returns the same image as the parser."""
    body = BODY % (HEAD, b"image")
    assert_alike(body[:at] + put + body[at + cut :])


@pytest.mark.parametrize("kind", ["", "\r\nContent-Type: image/png"])
@pytest.mark.parametrize(
    "boundary", ["b0undary", "----WebKitFormBoundary7MA4YWxkTrZu0gW", "------------------------d7"]
)
def test_common_clients_need_no_parser(kind: str, boundary: str) -> None:
    """The fast extraction reads the forms of browsers, curl and httpx."""
    body = (BODY % (HEAD + kind.encode(), b"image")).replace(b"--B", b"--" + boundary.encode())
    assert plain_image_of(f"multipart/form-data; boundary={boundary}", body) == b"image"


KIND = "multipart/form-data; boundary=B"
DISPOSITION = b"Content-Disposition: form-data; "


def part(head: bytes, content: bytes = b"image") -> bytes:
    return b"--B\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


def read(*parts: bytes, before: bytes = b"", after: bytes = b"", kind: str = KIND) -> Form:
    return read_form(kind, before + b"".join(parts) + b"--B--" + after)


ACCEPTED = {
    "as browsers send it": read(part(HEAD)),
    "preamble and epilogue": read(part(HEAD), before=b"to be ignored\r\n\r\n", after=b"\r\nto be ignored"),
    "preamble that begins with a dash": read(part(HEAD), before=b"-- a dash\r\n"),
    "line break first": read(part(HEAD), before=b"\r\n"),
    "quoted boundary": read(part(HEAD), kind='multipart/form-data; charset=utf-8; boundary="B"'),
    "blanks behind the boundary": read(part(HEAD).replace(b"--B\r\n", b"--B \t\r\n"), before=b"x\r\n"),
    **{
        f"Content-Transfer-Encoding {encoding}": read(
            part(HEAD + b"\r\nContent-Transfer-Encoding: " + encoding.encode())
        )
        for encoding in ("binary", "8bit", "7BIT")
    },
    "filename* alone": read(part(DISPOSITION + b"name=\"file\"; filename*=utf-8''a.png")),
    "filename and filename*": read(part(HEAD + b"; filename*=utf-8''a.png")),
    "no file name": read(part(DISPOSITION + b'name="file"')),
    "no quotes": read(part(DISPOSITION + b"name=file; filename=a.png")),
    "quotes in the file name": read(part(DISPOSITION + b'name="file"; filename="a\\"b;c.png"')),
    "unescaped quotes in the file name": read(part(DISPOSITION + b'name="file"; filename="a"b".png"')),
    "blanks around the parameters": read(part(DISPOSITION + b' name = "file" ; filename = "a.png" ')),
    "twelve headers": read(part(HEAD + b"".join(b"\r\nX-%d: y" % n for n in range(12)))),
    "another charset": read(part(DISPOSITION + b'name="_charset_"', b"utf-8"), part(HEAD)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_forms_of_common_clients_are_read(name: str) -> None:
    """Every form that RFC 7578 allows and common clients send gives its image."""
    assert ACCEPTED[name] == Form(b"image", {})


def test_fields_are_returned_beside_the_image() -> None:
    """Parameters before and after the file are returned as they are."""
    before, after = part(DISPOSITION + b'name="model"', b"zero"), part(DISPOSITION + b'name="alpha"', b"0.1")
    assert read(before, part(HEAD), after) == Form(b"image", {"model": "zero", "alpha": "0.1"})


REJECTED = {
    "no boundary": ((KIND[:19], part(HEAD)), MalformedMultipart, "no boundary"),
    "a long boundary": ((KIND + "B" * 300, part(HEAD)), MalformedMultipart, "boundary has more than"),
    "another boundary": ((KIND + "C", part(HEAD)), MalformedMultipart, "does not occur"),
    "no closing boundary": ((KIND, part(HEAD)), MalformedMultipart, "before its closing boundary"),
    "base64": (
        (KIND, part(HEAD + b"\r\nContent-Transfer-Encoding: base64")),
        MalformedMultipart,
        "Content-Transfer-Encoding base64",
    ),
    "no name": ((KIND, part(DISPOSITION)), MalformedMultipart, "with a name"),
    "no disposition": ((KIND, part(b"X: y")), MalformedMultipart, "with a name"),
    "a name twice": ((KIND, part(HEAD + b'; name="x"')), MalformedMultipart, "twice"),
    "a header twice": ((KIND, part(HEAD + b"\r\n" + HEAD)), MalformedMultipart, "twice"),
    "too many headers": (
        (KIND, part(HEAD + b"".join(b"\r\nX-%d: y" % n for n in range(20)))),
        MalformedMultipart,
        "RFC 7578",
    ),
    "no parts": ((KIND, b"--B--"), MissingFile, "no file"),
    "a file elsewhere": ((KIND, part(HEAD.replace(b"file", b"image", 1)) + b"--B--"), MissingFile, "`image`"),
    "two files": ((KIND, part(HEAD) * 2 + b"--B--"), TooManyFiles, "2 files"),
    "an empty file": ((KIND, part(HEAD, b"") + b"--B--"), EmptyBody, "empty"),
    "an unknown field": ((KIND, part(HEAD) + part(DISPOSITION + b'name="modle"')), InvalidParameter, "`modle`"),
    "a field twice": (
        (KIND, part(HEAD) + part(DISPOSITION + b'name="fit"') * 2 + b"--B--"),
        InvalidParameter,
        "`fit` is given twice",
    ),
    "a long field": (
        (KIND, part(HEAD) + part(DISPOSITION + b'name="fit"', b"x" * 1025) + b"--B--"),
        InvalidParameter,
        "more than 1024",
    ),
    "a field of other bytes": (
        (KIND, part(HEAD) + part(DISPOSITION + b'name="fit"', b"\xff") + b"--B--"),
        InvalidParameter,
        "UTF-8",
    ),
    "JSON": (("application/json", b'{"image": "iVBOR"}'), UnsupportedMediaType, "application/json"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_the_reason_of_a_rejected_form_is_named(name: str) -> None:
    """Each fault of a form raises its own problem, whose detail names the value in the request."""
    arguments, problem, words = REJECTED[name]
    with pytest.raises(problem) as caught:
        read_form(*arguments)
    assert type(caught.value) is problem
    assert words in caught.value.detail


def test_the_hint_for_json_shows_the_right_call() -> None:
    """A JSON body is 415, and the hint shows a call that works."""
    with pytest.raises(UnsupportedMediaType) as caught:
        plain_image_of("application/json; charset=utf-8", b'"data:image/png;base64,iVBOR"')
    assert "--data-binary" in caught.value.hint and "base64" in caught.value.hint


def outcome(body: bytes, sizes: list[int], field: str) -> list[object]:
    """Return the parts of a form, or its problem, when it arrives in pieces of these sizes."""
    known = frozenset(("model",)) if field == "file" else frozenset[str]()
    reader = FormReader(b"B", field, fields=known, largest=40, most=4)
    try:
        at = 0
        while at < len(body):
            size = sizes.pop(0) if sizes else len(body)
            reader.feed(body[at : at + size])
            at += size
        reader.finish()
    except Problem as problem:
        return [type(problem), problem.detail]
    return [(each.name, each.is_file, bytes(each.content), each.size) for each in reader.taken()]


@given(
    st.lists(
        st.sampled_from(
            [
                b"--B", b"\r\n", b"\r\n--B\r\n", b"\r\n--B--", b"--", b"B", b"\r", b"\n", b" ", b"\t", b"preamble",
                HEAD, HEAD + b"\r\n\r\n", HEAD.replace(b'"file"', b'"files"') + b"\r\n\r\n", b"image", b"X: y\r\n",
                b":", DISPOSITION + b'name="model"\r\n\r\n', b"\r\n--BB\r\n", b"x" * 50,
            ]
        ),
        max_size=14,
    ),
    st.lists(st.integers(1, 30), max_size=60),
    st.sampled_from(["file", "files"]),
)  # fmt: skip
@examples(max_examples=600)
def test_packets_do_not_change_the_answer(tokens: list[bytes], sizes: list[int], field: str) -> None:
    """However a form is split into packets, byte by byte included, its parts and its problem are the same."""
    body = b"".join(tokens)
    whole = outcome(body, [], field)
    assert outcome(body, sizes, field) == whole
    assert outcome(body, [1] * len(body), field) == whole


@pytest.mark.parametrize(
    "unit",
    [
        b"\r",
        b"\r\n",
        b"\n",
        b"-",
        b"\r\n--",
        b"\r\n--B",
        b"\r\n--B-",
        b"\r\n--B ",
        b"--B\r\n",
        b"a;",
        b'";',
        b":",
        part(HEAD, b""),
    ],
)
def test_hostile_forms_take_linear_time(unit: bytes) -> None:
    """A repeated fragment of a form is read at a megabyte per second or more, as preamble, header or content."""
    size = 2_000_000
    for start in (b"", part(HEAD)[:-2], b"--B\r\n" + DISPOSITION + b'name="'):
        body = start + unit * (size // len(unit))
        began = time.thread_time()
        with pytest.raises(Problem):
            read_form(KIND, body)
        assert time.thread_time() - began < 4


@pytest.mark.parametrize(
    "value", [b" " * 4000 + b'"', b'"' + b" " * 4000, b"a " * 2000 + b'"', b'" ' * 2000, b'\\"' * 2000]
)
def test_a_long_header_of_a_part_takes_linear_time(value: bytes) -> None:
    """A header that is almost as long as the parser accepts is rejected within a fraction of a second."""
    began = time.thread_time()
    with pytest.raises(Problem):
        read_form(KIND, part(DISPOSITION + b"name=" + value))
    assert time.thread_time() - began < 2


@pytest.mark.parametrize("blanks", [b"", b" ", b"\t  "])
def test_blanks_around_a_parameter_do_not_belong_to_it(blanks: bytes) -> None:
    """Names and values are read without the blanks around them, with and without quotes."""
    for value in (b"file", b'"file"'):
        head = DISPOSITION + blanks + b"name" + blanks + b"=" + blanks + value + blanks + b'; filename="a"' + blanks
        assert read_form(KIND, part(head, pngs.plain()) + b"--B--\r\n").image == pngs.plain()


def test_a_long_content_type_is_rejected() -> None:
    """A header Content-Type of 60 kB is rejected before it is parsed."""
    began = time.thread_time()
    with pytest.raises(MalformedMultipart, match="more than 1024"):
        read_form("multipart/form-data" + ";" * 60_000, b"x")
    assert time.thread_time() - began < 0.1


@asynccontextmanager
async def counted_turns() -> AsyncIterator[list[None]]:
    """Yield a list that grows by one element per turn of the event loop inside the block."""
    turns: list[None] = []
    loop = asyncio.get_running_loop()

    def count() -> None:
        nonlocal handle
        turns.append(None)
        handle = loop.call_soon(count)

    handle = loop.call_soon(count)
    yield turns
    handle.cancel()


async def test_a_form_that_has_arrived_lets_others_run() -> None:
    """While thousands of files of a compressed form are decoded, the event loop serves others."""
    count = 3000
    form = part(HEAD.replace(b'"file"', b'"files"'), pngs.plain()) * count + b"--B--\r\n"

    async def arrives() -> AsyncIterator[bytes]:
        yield gzip.compress(form)

    body = decoded_pieces(b"gzip", arrives(), limit=len(form))
    async with counted_turns() as turns:
        found = [chunk.count async for chunk in chunks(KIND, body, size=count, largest_file=65536, most_files=count)]
    assert found == [count]
    assert len(turns) > len(form) / 20_000


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
async def test_a_small_compressed_body_lets_others_run(encoding: bytes) -> None:
    """A reader of a body that grows a thousandfold awaits nothing itself: the event loop runs others between pieces."""
    size = 16 << 20
    body = gzip.compress(bytes(size)) if encoding == b"gzip" else zlib.compress(bytes(size))

    async def arrives() -> AsyncIterator[bytes]:
        yield body

    async with counted_turns() as turns:
        sizes = [len(piece) async for piece in decoded_pieces(encoding, arrives(), limit=size)]
    assert sum(sizes) == size
    assert len(turns) >= len(sizes) > 100


def test_both_routes_read_a_form_alike() -> None:
    """What `/score` accepts as `file`, `/score/batch` accepts as `files`."""
    for head in (HEAD, DISPOSITION + b'name="file"', HEAD + b"\r\nContent-Transfer-Encoding: binary"):
        single = b"x\r\n" + part(head, pngs.plain()) + b"--B--\r\nx"
        assert read_form(KIND, single).image == pngs.plain()

        async def arrives(body: bytes = single.replace(b'"file"', b'"files"')) -> AsyncIterator[bytes]:
            yield body

        async def collect(body: AsyncIterator[bytes]) -> list[int]:
            found = chunks(KIND, body, size=4, largest_file=65536, most_files=4)
            return [chunk.count - len(chunk.problems) async for chunk in found]

        assert asyncio.run(collect(arrives())) == [1]


RAW_DEFLATE = zlib.compressobj(wbits=-15)
CONTENT = random.Random(0).randbytes(100_000) + bytes(100_000)
ENCODED = {
    "gzip": (b"gzip", gzip.compress(CONTENT)),
    "x-gzip": (b"X-GZIP", gzip.compress(CONTENT)),
    "two members": (b"gzip", gzip.compress(CONTENT[:70_000]) + gzip.compress(CONTENT[70_000:])),
    "deflate": (b"deflate", zlib.compress(CONTENT)),
    "deflate without a header": (b"deflate", RAW_DEFLATE.compress(CONTENT) + RAW_DEFLATE.flush()),
    "identity": (b"identity", CONTENT),
    "none": (None, CONTENT),
}


async def decoded_in_pieces(encoding: bytes | None, body: bytes, size: int, limit: int) -> bytes:
    async def arrives() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    return b"".join([piece async for piece in decoded_pieces(encoding, arrives(), limit=limit)])


@pytest.mark.parametrize("name", ENCODED)
async def test_content_encodings_are_decoded(name: str) -> None:
    """gzip and deflate give the content, at once and in pieces."""
    encoding, body = ENCODED[name]
    assert decoded(encoding, body, limit=len(CONTENT)) == CONTENT
    for size in (1, 1000, 10**6):
        assert await decoded_in_pieces(encoding, body, size, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("content", [b"", b"x"])
async def test_many_small_gzip_members_are_rejected(content: bytes) -> None:
    """Members take longer than the bytes in them: 100,000 tiny ones are rejected within a fraction of a second."""
    body, began = gzip.compress(content) * 100_000, time.perf_counter()
    with pytest.raises(MalformedRequest, match="65 gzip members"):
        decoded(b"gzip", body, limit=10**6)
    with pytest.raises(MalformedRequest, match="65 gzip members"):
        await decoded_in_pieces(b"gzip", body, 65536, 10**6)
    assert time.perf_counter() - began < 2


def test_files_of_blocks_are_decoded() -> None:
    """A file of many members with content is read, as parallel compressors write it."""
    block = random.Random(0).randbytes(5000)
    assert decoded(b"gzip", gzip.compress(block) * 200, limit=10**6) == block * 200


@pytest.mark.parametrize("name", [name for name in ENCODED if name not in ("none", "identity")])
async def test_damaged_encodings_are_400(name: str) -> None:
    """Data that ends early, has bytes after its end or is not compressed is a malformed request."""
    encoding, body = ENCODED[name]
    for damaged in (body[:-1], body + b"more", b"nonsense"):
        with pytest.raises(MalformedRequest):
            decoded(encoding, damaged, limit=10**6)
        with pytest.raises(MalformedRequest):
            await decoded_in_pieces(encoding, damaged, 999, 10**6)


async def test_bombs_stop_at_the_limit() -> None:
    """A small body that decompresses to 50 MB gets 413 at the limit, whether it arrives whole or in pieces."""
    for encoding, body in ((b"gzip", gzip.compress(bytes(50_000_000))), (b"deflate", zlib.compress(bytes(50_000_000)))):
        with pytest.raises(BodyTooLarge):
            decoded(encoding, body, limit=65536)
        with pytest.raises(BodyTooLarge):
            await decoded_in_pieces(encoding, body, 1000, 65536)


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, gzip", b"compress"])
def test_other_encodings_are_415(encoding: bytes) -> None:
    """Another encoding gets 415, which names it, and the header Accept-Encoding lists the supported encodings."""
    with pytest.raises(UnsupportedEncoding, match=encoding.decode()) as caught:
        decoded(encoding, b"x", limit=10)
    assert caught.value.headers()["accept-encoding"] == "gzip, deflate"


def incomplete(*bodies: bytes) -> Any:
    """Return an ASGI channel with these pieces of a body whose last piece never arrives."""
    left = list(bodies)

    async def receive() -> MutableMapping[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": True}

    return receive


@virtual_time
async def test_a_slow_body_is_rejected_and_its_task_continues() -> None:
    """A body that is incomplete after the time limit raises `BodyTimeout`, and the task that read it continues."""
    clock = asyncio.get_running_loop().time
    reader = BodyReader(0.05, clock)
    with pytest.raises(BodyTimeout, match=r"0\.05 s"):
        await reader.read(incomplete(b"a", b"b"), declared=None, limit=10)
    assert clock() == pytest.approx(0.05, abs=0.0015)
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@virtual_time
async def test_each_body_has_its_own_time_limit() -> None:
    """Of three tasks that read at once, the two with incomplete bodies are interrupted one after the other."""
    reader = BodyReader(0.05, asyncio.get_running_loop().time)
    ends: list[str] = []

    async def read(name: str, wait: float) -> None:
        await advance(wait)
        try:
            await reader.read(incomplete(b"a"), declared=None, limit=10)
        except BodyTimeout:
            ends.append(name)

    async def complete() -> bytes:
        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": b"abc", "more_body": False}

        body = await reader.read(receive, declared=b"3", limit=10)
        await advance(0.1)
        return body

    *_, body = await asyncio.gather(read("second", 0.02), read("first", 0.0), complete())
    assert ends == ["first", "second"]
    assert body == b"abc"


@virtual_time
async def test_a_cancelled_reader_is_cancelled() -> None:
    """A task that another caller cancels while it reads raises `CancelledError`, and its deadline is forgotten."""
    reader = BodyReader(0.03, asyncio.get_running_loop().time)
    task = asyncio.create_task(reader.read(incomplete(), declared=None, limit=10))
    await advance(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not reader._deadlines


async def test_a_cancellation_takes_precedence_over_the_time_limit() -> None:
    """If a task is cancelled in the moment in which its body times out, it raises `CancelledError`."""
    reader = BodyReader(0.03)
    task = asyncio.create_task(reader.read(incomplete(), declared=None, limit=10))
    await asyncio.sleep(0)
    reader._interrupt(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
