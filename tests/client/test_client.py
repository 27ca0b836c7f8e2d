"""The client with the service as a process: results, exceptions, overload and restarts of the service."""

from __future__ import annotations

import gc
import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from anomaly import NO_RETRY, AsyncClient, Client, Fitted, Retry, Score, TimedOut, UnexpectedReply, Unreachable
from anomaly.client import errors
from tests import model_stores, pngs
from tests.conftest import EXAMPLES, ROOT, Server, free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a running service."""
    server = Server(tmp_path_factory.mktemp("server")).start()
    yield server
    server.stop()


@pytest.fixture
def service(server: Server) -> Iterator[Client]:
    """Yield a client of the running service that asks once."""
    with Client(server.url, retry=NO_RETRY) as client:
        yield client


def test_a_score_is_what_the_service_said(server: Server, service: Client, zero: bytes) -> None:
    """Every member of the reply is an attribute with the same value, and the whole reply is in `document`."""
    score = service.score(zero)
    reply = server.get(f"/reconstruction/{score.id}", headers={"accept": "application/json"}).json()
    assert score.document == reply
    for name in ("id", "model", "version", "mse", "threshold", "alpha", "p_value", "is_anomaly", "reason"):
        assert getattr(score, name) == reply[name]


def test_a_path_is_as_good_as_bytes(service: Client, zero: bytes) -> None:
    """A file gives the score of its bytes."""
    assert service.score(EXAMPLES / "zero.png").mse == service.score(zero).mse


def test_options_reach_the_service(service: Client, zero: bytes) -> None:
    """`model` and `alpha` choose version and threshold."""
    plain = service.score(zero)
    chosen = service.score(zero, model=f"{plain.model}@{plain.version}", alpha=0.5)
    assert (chosen.model, chosen.version, chosen.mse) == (plain.model, plain.version, plain.mse)
    assert chosen.alpha == 0.5
    assert chosen.threshold < plain.threshold


@pytest.mark.parametrize("view", ["reconstruction", "input", "error", "panel"])
def test_pictures_of_a_score(service: Client, zero: bytes, view: str) -> None:
    """Each view of a stored reconstruction is returned as a PNG, by score and by id."""
    score = service.score(zero)
    assert score.id is not None
    picture = service.reconstruction(score, view=view, scale=2)  # type: ignore[arg-type]
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert service.reconstruction(score.id, view=view, scale=2) == picture  # type: ignore[arg-type]


def test_the_models(service: Client) -> None:
    """The list names the default model with the version that answers."""
    default = next(model for model in service.models() if model.is_default)
    assert default.current in default.versions
    assert default.normal_class == default.document["normal_class"] == "the digit 0"


@pytest.mark.parametrize(
    ("ask", "kind", "status"),
    [
        (lambda s, _: s.score(b"no image"), errors.NotAPng, 422),
        (lambda s, png: s.score(png[:60]), errors.TruncatedPng, 422),
        (lambda s, _: s.score(b""), errors.EmptyBody, 400),
        (lambda s, png: s.score(png + bytes(70_000)), errors.BodyTooLarge, 413),
        (lambda s, png: s.score(png, model="nobody"), errors.ModelNotFound, 404),
        (lambda s, png: s.score(png, model="zero-article@999"), errors.ModelNotFound, 404),
        (lambda s, png: s.score(png, model="../etc"), errors.InvalidParameter, 422),
        (lambda s, png: s.score(png, alpha=2.0), errors.InvalidParameter, 422),
        (lambda s, png: s.score(png, alpha=1e-9), errors.UnsupportedAlpha, 422),
        (lambda s, _: s.reconstruction("0" * 44), errors.ReconstructionNotFound, 404),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refusals_are_exceptions_of_their_kind(
    service: Client, zero: bytes, ask: Callable[[Client, bytes], object], kind: type[errors.Problem], status: int
) -> None:
    """A rejected request raises the class of its problem, with status, message, hint and request id."""
    with pytest.raises(errors.Problem) as caught:
        ask(service, zero)
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert caught.value.title in str(caught.value)
    assert caught.value.hint
    assert caught.value.request_id


def test_a_port_without_a_service(zero: bytes) -> None:
    """Without a service at the address, `score` raises `Unreachable` at once, with retries and without."""
    url = f"http://127.0.0.1:{free_port()}"
    for retry in (NO_RETRY, Retry(patience=30.0)):
        started = time.monotonic()
        with Client(url, retry=retry) as service, pytest.raises(Unreachable, match=url):
            service.score(zero)
        assert time.monotonic() - started < 1


def test_a_file_that_is_not_there(service: Client, tmp_path: Path) -> None:
    """An image that this machine cannot read raises `UnreadableImage`, and nothing is sent."""
    with pytest.raises(errors.UnreadableImage, match=r"missing\.png"):
        service.score(tmp_path / "missing.png")


def test_what_fitting_did_is_typed(service: Client) -> None:
    """With `fit="mnist"`, the score lists the changes to the image; without it, the image is unchanged."""
    with Image.open(EXAMPLES / "zero.png") as zero:
        large = ImageOps.invert(zero.convert("L")).resize((280, 280))
    buffer = io.BytesIO()
    large.save(buffer, "PNG")
    score = service.score(buffer.getvalue(), fit="mnist")
    assert isinstance(score.fitted, Fitted)
    assert score.fitted.inverted is True
    assert list(score.fitted.crop) == score.document["fitted"]["crop"]
    assert service.score(EXAMPLES / "zero.png").fitted is None


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "service",
        "http://[::1",
        "http://host:port",
        "http://a\nb",
        f"http://{'a' * 70}.com",
    ],
)
def test_what_is_no_url(url: str) -> None:
    """An invalid URL raises before any request."""
    with pytest.raises(ValueError, match="URL"):
        Client(url)


@pytest.mark.parametrize("key", ["", "  ", "two\nlines", "schlüssel"])
def test_what_is_no_key(key: str) -> None:
    """A key that is not valid in a header raises before any request, and the message does not contain it."""
    with pytest.raises(ValueError, match="API key") as caught:
        Client("http://127.0.0.1:1", api_key=key)
    assert not key.strip() or key not in str(caught.value)


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Another server: returns an HTML page to each request, and records the requests."""

    asked: list[tuple[str, str | None]]
    came: threading.Event
    over: threading.Event

    def do_GET(self) -> None:
        """Reply with a page, or wait until the end of the test."""
        length = int(self.headers.get("content-length") or 0)
        self.rfile.read(length)
        type(self).asked.append((self.path, self.headers.get("x-api-key")))
        type(self).came.set()
        if "silent" in self.path:
            type(self).over.wait(30)
        status = 404 if "missing" in self.path else 302 if "moved" in self.path else 200
        self.send_response(status)
        self.send_header("content-type", "text/html")
        self.send_header("location", "/elsewhere")
        self.end_headers()
        self.wfile.write(b"<p>Welcome</p>")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Yield the URL of a real server that is not this service."""
    Elsewhere.asked, Elsewhere.came, Elsewhere.over = [], threading.Event(), threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Elsewhere.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("prefix", ["", "/missing", "/moved"])
def test_another_server_is_not_taken_for_this_one(elsewhere: str, zero: bytes, prefix: str) -> None:
    """A page, a redirect and a foreign 404 are unexpected replies: not scores, and not `ModelNotFound`."""
    with Client(elsewhere + prefix) as service:
        for ask in (service.models, lambda: service.score(zero), lambda: service.reconstruction("0" * 44)):
            with pytest.raises(UnexpectedReply, match=elsewhere):
                ask()


def test_prefix_and_key_go_with_every_request(elsewhere: str, zero: bytes) -> None:
    """The gateway's path prefix is added to every route, and the key is in the header X-API-Key."""
    with Client(f"{elsewhere}/a/b/", api_key=" s3cret ") as service:
        for ask in (service.models, lambda: service.score(zero), lambda: service.reconstruction("0" * 44)):
            with pytest.raises(UnexpectedReply):
                ask()
    paths = [path.partition("?")[0] for path, _ in Elsewhere.asked]
    assert paths == ["/a/b/models", "/a/b/score", f"/a/b/reconstruction/{'0' * 44}"]
    assert {key for _, key in Elsewhere.asked} == {"s3cret"}


def test_silence_is_a_time_out(elsewhere: str, zero: bytes) -> None:
    """A server that does not reply in time raises `TimedOut` without a retry."""
    with Client(f"{elsewhere}/silent", timeout=0.3) as service, pytest.raises(TimedOut):
        service.score(zero)
    assert Elsewhere.came.wait(30)  # the server's thread may be slower than the time-out
    assert len(Elsewhere.asked) == 1


def test_a_service_behind_a_prefix(make_server: Callable[..., Server], zero: bytes) -> None:
    """With a path prefix that a gateway removes, scoring works, and pictures can be fetched by id."""
    server = make_server(ANOMALY_ROOT_PATH="/anomaly").start()
    with Client(server.url, retry=NO_RETRY) as service:
        score = service.score(zero)
        assert score.document["reconstruction"] == f"/anomaly/reconstruction/{score.id}"
        assert service.reconstruction(score).startswith(b"\x89PNG")


def test_many_scores_in_order(service: Client, zero: bytes, six: bytes) -> None:
    """`score_many` scores concurrently and returns results in order; an error is the result of its image only."""
    images = [zero, six, b"no image", zero[:60]] * 100
    told: list[tuple[int, int | None]] = []
    results = list(service.score_many(images, concurrency=8, on_progress=lambda *now: told.append(now)))
    expected = [service.score(zero).mse, service.score(six).mse]
    assert len(results) == 400
    for start in range(0, 400, 4):
        first, second, third, fourth = results[start : start + 4]
        assert isinstance(first, Score)
        assert isinstance(second, Score)
        assert [first.mse, second.mse] == pytest.approx(expected, rel=1e-6)
        assert (type(third), type(fourth)) == (errors.NotAPng, errors.TruncatedPng)
    assert told == [(n, 400) for n in range(1, 401)]


def test_what_befalls_every_image_is_raised(service: Client, zero: bytes) -> None:
    """An unknown model ends the run at the first image instead of failing a million times."""
    taken = 0

    def images() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(1_000_000):
            taken += 1
            yield zero

    with pytest.raises(errors.ModelNotFound):
        list(service.score_many(images(), model="nobody", concurrency=4))
    assert taken <= 8


def test_leaving_early_takes_no_more_images(service: Client, zero: bytes) -> None:
    """If the caller stops iterating, the work ends: only a bounded number of images was read."""
    taken = 0

    def images() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(1_000_000):
            taken += 1
            yield zero

    results = service.score_many(images(), concurrency=4)
    assert isinstance(next(results), Score)
    results.close()
    assert taken <= 8


def test_closing_after_leaving_early_leaves_nothing_open(
    server: Server, zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that a thread makes while the client is being closed is closed as well."""
    left_open: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda said: left_open.append(said.exc_value))
    for concurrency in [1, 2, 4, 8] * 5:
        with Client(server.url) as service:
            results = service.score_many([zero] * 100, concurrency=concurrency)
            assert isinstance(next(results), Score)
            results.close()
    for thread in threading.enumerate():
        if thread.name.startswith("score"):
            thread.join()
    gc.collect()
    assert left_open == []


def test_no_concurrency_is_refused(service: Client) -> None:
    """A concurrency of 0 raises an error instead of waiting forever."""
    with pytest.raises(ValueError, match="concurrency"):
        list(service.score_many([], concurrency=0))


async def test_the_async_client_does_the_same(server: Server, zero: bytes, six: bytes) -> None:
    """Scores, pictures, models, order, progress and errors of `AsyncClient` are equal to those of `Client`."""
    told: list[tuple[int, int | None]] = []
    async with AsyncClient(server.url, retry=NO_RETRY) as service:
        score = await service.score(EXAMPLES / "zero.png")
        assert (await service.reconstruction(score, view="panel", scale=4)).startswith(b"\x89PNG")
        assert any(model.is_default for model in await service.models())
        with pytest.raises(errors.UnsupportedAlpha):
            await service.score(zero, alpha=1e-9)
        images = [zero, b"no image", six] * 50
        many = service.score_many(images, concurrency=8, on_progress=lambda *now: told.append(now))
        results = [result async for result in many]
        with pytest.raises(errors.ModelNotFound):
            async for _ in service.score_many(images, model="nobody"):
                pass
    assert [type(result) for result in results] == [Score, errors.NotAPng, Score] * 50
    assert [result.mse for result in results[::3] if isinstance(result, Score)] == pytest.approx([score.mse] * 50)
    assert told == [(n, 150) for n in range(1, 151)]


async def test_a_port_without_a_service_in_async_code(zero: bytes) -> None:
    """The same holds for `AsyncClient`."""
    async with AsyncClient(f"http://127.0.0.1:{free_port()}") as service:
        started = time.monotonic()
        with pytest.raises(Unreachable):
            await service.score(zero)
        assert time.monotonic() - started < 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a running service with room for one waiting image, so that a burst overloads it."""
    room = {
        "ANOMALY_QUEUE_MAX_IMAGES": "1",
        "ANOMALY_MICROBATCH_MAX_SIZE": "2",
        "ANOMALY_MICROBATCH_MAX_DELAY_MS": "20",
    }
    server = Server(tmp_path_factory.mktemp("tiny"), **room).start()
    yield server
    server.stop()


def shed(server: Server) -> float:
    """Return the number of images that the service has rejected."""
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if '_problems_total{type="overloaded"}' in line)


def test_overload_without_retries_is_an_exception(tiny: Server, zero: bytes) -> None:
    """A burst on a full queue raises `Overloaded` with the seconds that the service named."""
    with Client(tiny.url, retry=NO_RETRY) as service, pytest.raises(errors.Overloaded) as caught:
        list(service.score_many([zero] * 200, concurrency=16))
    assert caught.value.retry_after == 1


def test_overload_is_waited_out(tiny: Server, zero: bytes) -> None:
    """Under real overload every image gets its score in the end, although the service rejected many requests."""
    before = shed(tiny)
    with Client(tiny.url, retry=Retry(patience=60)) as service:
        results = list(service.score_many([zero] * 40, concurrency=4))
    assert [type(result) for result in results] == [Score] * 40
    assert shed(tiny) - before >= 3


async def test_overload_is_waited_out_in_async_code(tiny: Server, zero: bytes) -> None:
    """The same holds for `AsyncClient`."""
    before = shed(tiny)
    async with AsyncClient(tiny.url, retry=Retry(patience=60)) as service:
        results = [result async for result in service.score_many([zero] * 40, concurrency=4)]
    assert [type(result) for result in results] == [Score] * 40
    assert shed(tiny) - before >= 3


def test_a_restart_in_the_middle_loses_nothing(make_server: Callable[..., Server], zero: bytes) -> None:
    """The service is killed while it scores and started again: every image still gets its score, in order."""
    server = make_server().start()
    killed = threading.Event()

    def interrupt(done: int, _: int | None) -> None:
        if done == 20:
            server.stop("kill")
            server.start(wait=False)
            killed.set()

    with Client(server.url, retry=Retry(patience=90)) as service:
        results = list(service.score_many([zero] * 300, concurrency=4, on_progress=interrupt))
    assert killed.is_set()
    assert [type(result) for result in results] == [Score] * 300


def test_a_deadline_that_passes_is_its_own_problem(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """A service that exceeds its deadline returns 504, which raises `DeadlineExceeded`."""
    environment = {"ANOMALY_MODEL_STORE": str(model_stores.hanging(tmp_path / "store"))}
    environment |= {"ANOMALY_DEFAULT_MODEL": "zero-article"}
    environment |= {"ANOMALY_DEADLINE_MS": "200", "ANOMALY_STORE_TIMEOUT_MS": "100"}
    server = make_server(**environment).start()
    with Client(server.url, retry=NO_RETRY) as service, pytest.raises(errors.DeadlineExceeded):
        service.score(pngs.plain(np.full((28, 28), 255, np.uint8)))


def test_a_key_opens_the_service(make_server: Callable[..., Server], tmp_path: Path, zero: bytes) -> None:
    """A service with API keys raises `Unauthorized` without a valid key, and scores with a valid one."""
    keys = tmp_path / "keys"
    keys.write_text(f"{hashlib.sha256(b'right').hexdigest()} alice\n")
    server = make_server(ANOMALY_API_KEYS_FILE=str(keys)).start()
    for key in (None, "wrong"):
        with Client(server.url, api_key=key) as service, pytest.raises(errors.Unauthorized):
            list(service.score_many([zero] * 10))
    with Client(server.url, api_key="right") as service:
        assert service.reconstruction(service.score(zero)).startswith(b"\x89PNG")
    (tmp_path / "key").write_text("right\n")
    for extra, code in (([], 2), (["--key-file", str(tmp_path / "key")], 0)):
        command = [
            sys.executable,
            "-m",
            "anomaly.cli",
            "score",
            str(EXAMPLES / "zero.png"),
            "--url",
            server.url,
            *extra,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "right" not in done.stdout + done.stderr


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_examples_of_the_page_run(server: Server, tmp_path: Path, number: int) -> None:
    """Each Python block of docs/client.md runs unchanged, except for the port."""
    page = (ROOT / "docs" / "client.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "examples").symlink_to(EXAMPLES)
    code = blocks[number].replace("http://127.0.0.1:8000", server.url)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
