"""`/problems` and `/problems/{name}` explain every problem type, to a browser and to a program."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from app.problems import Problem
from app.settings import Settings
from tests.conftest import ROOT, SHARED, running


def kinds(kind: type[Problem] = Problem) -> Iterator[type[Problem]]:
    """Yield every problem of the service."""
    for child in kind.__subclasses__():
        if child.__module__.startswith("app.problems"):
            yield child
            yield from kinds(child)


def plain(page: str) -> str:
    """Return a page without its `code` elements and entities."""
    return html.unescape(re.sub("</?code>", "", page))


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
@SHARED
async def test_every_problem_has_its_page(shared_client: httpx.AsyncClient, kind: type[Problem]) -> None:
    """The page contains title, status, meaning and advice; with `Accept: application/json` the same as JSON."""
    page = await shared_client.get(kind.type, headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    text = plain(page.text)
    for part in (kind.title, str(kind.status), inspect.getdoc(kind), kind.hint, kind.type):
        assert part.replace("`", "") in text, part
    document = await shared_client.get(kind.type, headers={"accept": "application/json"})
    assert document.headers["vary"] == "accept"
    assert document.json() == {
        "type": kind.type,
        "title": kind.title,
        "status": kind.status,
        "meaning": inspect.getdoc(kind),
        "advice": kind.hint,
    }


async def test_the_list_names_every_type(client: httpx.AsyncClient) -> None:
    """The list links to each page, also to those of the types that only the gateway returns."""
    page = (await client.get("/problems")).text
    listed = (await client.get("/problems", headers={"accept": "application/json"})).json()["problems"]
    gateway = re.findall(r'"type":"(/problems/[a-z-]+)"', (ROOT / "deploy" / "gateway" / "haproxy.cfg").read_text())
    assert gateway
    assert {each["type"] for each in listed} == {kind.type for kind in kinds()} | set(gateway)
    for each in listed:
        assert f'href="{each["type"].removeprefix("/")}"' in page
        assert (await client.get(each["type"])).status_code == 200


@pytest.mark.parametrize("path", ["/problems", "/problems/not-a-png"])
@SHARED
async def test_links_of_a_page_lead_somewhere(shared_client: httpx.AsyncClient, path: str) -> None:
    """Links are relative, so that they work behind a path prefix."""
    for target in set(re.findall(r'(?:href|src)="([^"]+)"', (await shared_client.get(path)).text)):
        assert not target.startswith(("/", "http")), target
        assert (await shared_client.get(str(httpx.URL(f"http://test{path}").join(target)))).status_code == 200, target


async def test_the_pages_need_no_key(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    """A problem document links to its page also for a client without a key."""
    keys = tmp_path / "api_keys"
    keys.write_text(f"{'0' * 64} alice\n")
    async with running(make_settings(api_keys_file=keys)) as client:
        reply = await client.get("/models")
        assert reply.status_code == 401
        assert (await client.get(reply.json()["type"])).status_code == 200
        assert (await client.get("/problems")).status_code == 200


async def test_an_unknown_type_is_a_problem(client: httpx.AsyncClient) -> None:
    """A type that does not exist is 404, and a media type that is not offered is 406."""
    assert (await client.get("/problems/nothing")).json()["type"] == "/problems/not-found"
    assert (await client.get("/problems/not-found", headers={"accept": "image/png"})).status_code == 406


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/nothing", "not-found"),
        ("/deep/path/<b>", "not-found"),
        ("/models/unknown", "model-not-found"),
        ("/models/zero-article/versions/9", "model-not-found"),
        ("/models/zero-article/versions/one", "invalid-parameter"),
        ("/reconstruction/00", "reconstruction-not-found"),
        ("/page/nothing.js", "not-found"),
    ],
)
@SHARED
async def test_a_browser_gets_an_error_as_a_page(shared_client: httpx.AsyncClient, path: str, kind: str) -> None:
    """A browser gets a page with the title, the hint and links that exist; other clients get the problem document."""
    page = await shared_client.get(path, headers={"accept": BROWSER})
    assert (page.headers["content-type"], page.headers["vary"]) == ("text/html; charset=utf-8", "accept")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for accept in ("*/*", "application/json", "application/problem+json, */*;q=0.9"):
        reply = await shared_client.get(path, headers={"accept": accept})
        document = reply.json()
        assert document["type"] == f"/problems/{kind}"
        assert page.status_code == reply.status_code == document["status"]
    text = plain(page.text)
    assert document["title"] in text
    assert document["hint"].replace("`", "") in text
    assert page.headers["x-request-id"] in text
    assert "<b>" not in page.text
    links = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert len(links) >= 6
    for link in links:
        assert (await shared_client.get(str(httpx.URL(f"http://test{path}").join(link)))).status_code == 200, link
