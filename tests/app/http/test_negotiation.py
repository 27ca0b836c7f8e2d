"""Content negotiation: which offered media type a header Accept selects."""

from __future__ import annotations

import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.http.negotiation import choose
from tests.requests import assert_problem

PICTURE = ("image/png", "application/json")
BATCH = ("application/json", "application/x-ndjson", "application/x-npy")
CARD = ("application/json", "text/html")
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"
JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"


@pytest.mark.parametrize(
    ("accept", "offered", "chosen"),
    [
        ("", PICTURE, "image/png"),
        (" , ", PICTURE, "image/png"),
        ("*/*", CARD, "application/json"),
        (CHROME, CARD, "text/html"),
        (CHROME, PICTURE, "image/png"),
        ("text/html;q=0.5, application/json;q=0.9", CARD, "application/json"),
        ("text/*", CARD, "text/html"),
        ("text/html;q=0, */*", CARD, "application/json"),
        ("application/json;q=0, */*", CARD, "text/html"),
        ("application/*;q=0.9, application/json;q=0.1, text/html;q=0.5", CARD, "text/html"),
        ("application/json;q=0.1, */*", PICTURE, "image/png"),
        ("image/*;q=0.1, application/json", PICTURE, "application/json"),
        ("application/json, text/plain, */*", PICTURE, "image/png"),
        (JAVA, PICTURE, "image/png"),
        (JAVA, CARD, "application/json"),
        (JAVA, BATCH, "application/json"),
        ("application/x-npy, application/x-ndjson", BATCH, "application/x-npy"),
        ("application/x-ndjson;q=0.1, application/json", BATCH, "application/json"),
        ("APPLICATION/X-NPY ; Q=1.0", BATCH, "application/x-npy"),
        ("application/json; charset=utf-8", BATCH, "application/json"),
        ('text/html;title="a, image/png", application/json', PICTURE, "application/json"),
        ("application/x-npy;q=0.000", BATCH, None),
        ("text/plain", BATCH, None),
        ("*/*;q=0", BATCH, None),
        ("image/png;q=nonsense", PICTURE, "image/png"),
        ("image/png;q=7", PICTURE, "image/png"),
    ],
)
def test_quality_and_specificity_decide(accept: str, offered: tuple[str, ...], chosen: str | None) -> None:
    """The most specific range gives the quality of a type, the highest quality wins, then the order decides."""
    assert choose(accept, offered) == chosen


@given(st.text(alphabet='ab*/;,=q01. \t"\\', max_size=60))
def test_no_header_breaks_the_choice(accept: str) -> None:
    """Every header selects an offered type or none."""
    assert choose(accept, PICTURE) in (*PICTURE, None)


def test_hostile_headers_take_linear_time() -> None:
    """A header of 64 KiB is read within a fraction of a second."""
    for unit in ('"', ",", ";q=", '"\\', "a/b;", '",'):
        began = time.thread_time()
        choose((unit * 65536)[:65536], PICTURE)
        assert time.thread_time() - began < 2


def test_a_long_number_takes_linear_time() -> None:
    """A quality of 60,000 digits, with a letter at its end, is read within a fraction of a second."""
    began = time.thread_time()
    assert choose("text/html;q=" + "1" * 60_000 + "x", CARD) == "text/html"
    assert time.thread_time() - began < 2


def test_only_the_first_hundred_ranges_are_read() -> None:
    """A range after them neither selects a type nor takes time."""
    assert choose(",".join(["a/b"] * 99 + ["text/html"]), CARD) == "text/html"
    assert choose(",".join(["a/b"] * 100 + ["text/html"]), CARD) is None


def test_only_the_first_sixteen_parameters_are_read() -> None:
    """The quality may be one of them; a range of 60,000 parameters takes no time."""
    assert choose("text/html" + ";a=b" * 15 + ";q=0.5,application/json;q=0.7", CARD) == "application/json"
    assert choose("text/html" + ";a=b" * 16 + ";q=0.5,application/json;q=0.7", CARD) == "text/html"
    assert choose("text/html" + ";" * 60_000, CARD) == "text/html"


@pytest.mark.parametrize("path", ["/reconstruction/" + "0" * 44, "/models/zero-article"])
async def test_nothing_acceptable_is_406(client: httpx.AsyncClient, path: str) -> None:
    """If the client accepts none of the offered types, the reply is 406 and lists them."""
    document = assert_problem(await client.get(path, headers={"accept": "audio/ogg"}), 406, "not-acceptable")
    assert "application/json" in document["detail"]


async def test_browsers_get_the_model_card_and_programs_the_manifest(client: httpx.AsyncClient) -> None:
    """`/models/{name}` returns HTML to a browser and JSON to every other client."""
    for accept, kind in ((CHROME, "text/html"), ("*/*", "application/json"), ("application/json", "application/json")):
        reply = await client.get("/models/zero-article", headers={"accept": accept})
        assert reply.headers["content-type"].startswith(kind)
        assert reply.headers["vary"] == "accept"
