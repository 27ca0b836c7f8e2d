"""Starts a real Chromium and the real service, and checks requirements that apply to each page."""

from __future__ import annotations

import fcntl
import io
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import ROOT, TRUSTS_NOBODY, Server

# No test fails because a machine is slow: Playwright's own limit of 5 s is one.
expect.set_options(timeout=30_000)

HERE = Path(__file__).parent
IMAGES = ROOT / "docs" / "images"
CHROMIUM = shutil.which("chromium")
OFFLINE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the test with a reason if there is no browser."""
    if CHROMIUM is None:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason="Chromium is not installed"))


@pytest.fixture(scope="session")
def axe() -> str:
    """Return the source of axe-core, in the version of the lock file."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    script = HERE / "node_modules" / "axe-core" / "axe.min.js"
    # One of several test processes installs: `npm ci` first removes the files that the others read.
    with (HERE / "package-lock.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not script.exists():
            subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=HERE, check=True, timeout=120)
        return script.read_text()


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a running service that many tests share."""
    # A score that a busy machine stores too late has no id, and the page no link to it.
    limits = {"ANOMALY_DEADLINE_MS": "10000", "ANOMALY_STORE_TIMEOUT_MS": "5000"}
    server = Server(tmp_path_factory.mktemp("service"), **limits).start()
    yield server
    server.stop()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Yield a headless Chromium.

    It ends with the last test of this folder: while Playwright runs, this thread has a running event loop, and no
    asyncio test of another folder could have its own.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OFFLINE, timeout=120_000)
        yield browser
        browser.close()


class Watched:
    """A page that records errors and requests to other hosts."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self.abroad: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        # Chromium itself reports each rejected request; the tests check the page's reaction instead.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.abroad.append(request.url)


@pytest.fixture
def open_page(browser: Browser, service: Server) -> Iterator[Callable[..., Page]]:
    """Return an opener of the page; at the end, there must be no console error and no request to another host."""
    watched: list[Watched] = []
    contexts = []

    def opener(url: str | None = None, *, path: str = "/", wait: bool = True, **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        watched.append(Watched(page, url or service.url))
        page.goto((url or service.url) + path)
        if wait:
            expect(page.locator("#alpha")).to_be_enabled()
        return page

    yield opener
    for context in contexts:
        context.close()
    assert [error for each in watched for error in each.errors] == []
    assert [url for each in watched for url in each.abroad] == []


def stroke(page: Page, points: list[tuple[float, float]]) -> None:
    """Draw one stroke with the mouse; points are shares of the pad's side."""
    box = page.locator("#pad").bounding_box()
    assert box is not None
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for point in at[1:]:
        page.mouse.move(*point)
    page.mouse.up()


def ellipse(
    x: float, y: float, width: float, height: float, start: float = 0, turn: float = 360
) -> list[tuple[float, float]]:
    """Return points on an ellipse around (x, y); angles in degrees, against the clock from the right."""
    angles = [math.radians(start + turn * n / 40) for n in range(41)]
    return [(x + width / 2 * math.cos(angle), y - height / 2 * math.sin(angle)) for angle in angles]


def draw_zero(page: Page) -> None:
    """Draw a zero as one does: one slightly slanted loop."""
    stroke(page, [(x - 0.12 * (y - 0.5), y) for x, y in ellipse(0.5, 0.5, 0.5, 0.66, 90, 372)])


def draw_six(page: Page) -> None:
    """Draw a six: a bow down the left side that closes into a loop."""
    stroke(
        page,
        [
            (0.62, 0.15),
            (0.52, 0.22),
            (0.43, 0.34),
            (0.38, 0.48),
            (0.36, 0.6),
            *ellipse(0.5, 0.66, 0.27, 0.32, 180, 400),
        ],
    )


Refuse = Callable[[str, str], int | None]
"""Gets method and path of each request. Returns the status of the rejection, or None to forward the request."""


@pytest.fixture
def gateway() -> Iterator[Callable[..., str]]:
    """Return a function that starts gateways, which remove their path prefix and forward no other paths."""
    gateways: list[ThreadingHTTPServer] = []

    def start(server: Server, prefix: str = "", refuse: Refuse = lambda *_: None) -> str:
        class Gateway(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not self.path.startswith(f"{prefix}/"):
                    self.send_error(404)
                    return
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status = refuse(self.command, self.path)
                if status is not None:
                    self.send_response(status)
                    self.send_header("retry-after", "1")
                    self.send_header("content-length", "0")
                    self.end_headers()
                    return
                url = server.url + self.path.removeprefix(prefix)
                try:
                    headers = dict(self.headers)
                    answer = httpx.request(self.command, url, content=body, headers=headers, verify=TRUSTS_NOBODY)
                except httpx.TransportError:
                    self.send_error(502)
                    return
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        gateways.append(ThreadingHTTPServer(("127.0.0.1", 0), Gateway))
        threading.Thread(target=gateways[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{gateways[-1].server_port}"

    yield start
    for each in gateways:
        each.shutdown()
        each.server_close()


@pytest.fixture
def photograph() -> Callable[..., None]:
    """Return a function that takes screenshots for the documentation if SCREENSHOTS is set."""

    def take(page: Page, name: str, *, whole: bool = True) -> None:
        if not os.environ.get("SCREENSHOTS"):
            return
        page.evaluate("document.activeElement?.blur(); scrollTo(0, 0)")
        with Image.open(io.BytesIO(page.screenshot(full_page=whole))) as picture:
            picture.convert("RGB").save(IMAGES / f"{name}.png", optimize=True)
        assert (IMAGES / f"{name}.png").stat().st_size < 300 * 1024

    return take
