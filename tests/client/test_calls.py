"""The calls of both clients besides `score`, and when a connection is retried."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import anomaly
from anomaly import AsyncClient, Client, ConnectionFailed, Problem, Retry, Score, Unreachable
from anomaly.client import errors, wire
from tests.client.test_faults import GOOD, answering
from tests.conftest import EXAMPLES, MODEL_STORE, ROOT, Server, free_port

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a running service."""
    server = Server(tmp_path_factory.mktemp("server"), ANOMALY_DEFAULT_MODEL="zero-article").start()
    yield server
    server.stop()


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """Return a function that calls a method of a new client of either kind."""

    def call(url: str, method: str, *arguments: Any, **options: Any) -> Any:
        if request.param == "sync":
            with Client(url) as service:
                return getattr(service, method)(*arguments, **options)

        async def run() -> Any:
            async with AsyncClient(url) as service:
                return await getattr(service, method)(*arguments, **options)

        return asyncio.run(run())

    return call


def digits() -> np.ndarray[Any, Any]:
    """Return the shipped digits as a stack."""
    return np.stack([np.asarray(Image.open(EXAMPLES / name)) for name in ("zero.png", "six.png")])


def test_an_array_gets_the_scores_of_its_images(
    server: Server, call: Call, zero: bytes, six: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`score_array` returns what `score` does, image by image, also when it needs several requests."""
    monkeypatch.setattr(wire, "BATCH_IMAGES", 3)
    single = [call(server.url, "score", png) for png in (zero, six)]
    scores = call(server.url, "score_array", np.concatenate([digits()] * 4))
    assert [type(score) for score in scores] == [Score] * 8
    for score, expected in zip(scores, single * 4, strict=True):
        assert score.mse == pytest.approx(expected.mse, rel=1e-5)
        assert (score.is_anomaly, score.threshold, score.alpha) == (
            expected.is_anomaly, expected.threshold, expected.alpha,
        )  # fmt: skip
        assert (score.id, score.model, score.version) == (None, expected.model, expected.version)
    assert call(server.url, "score_array", digits(), alpha=0.2)[0].alpha == 0.2
    assert call(server.url, "score_array", np.zeros((0, 28, 28), np.uint8)) == []


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        (np.zeros((2, 28, 28)), "255"),
        (np.zeros((28, 28), np.uint8), r"\[N, 28, 28\]"),
        ([np.zeros((28, 28), np.uint8)], "numpy.stack"),
    ],
)
def test_another_array_is_a_type_error(call: Call, stack: Any, words: str) -> None:
    """Floats, a single image and a list raise `TypeError` that states what to pass; nothing is sent."""
    with pytest.raises(TypeError, match=words):
        call("http://127.0.0.1:1", "score_array", stack)


def test_one_image_of_a_batch_may_have_a_problem() -> None:
    """A problem takes the place of its image's score; a reply without an image is unexpected."""
    shared = {"model": "m", "version": 1, "threshold": 0.2, "alpha": 0.1}
    items: list[dict[str, Any]] = [
        {"index": 0, "mse": 0.1, "p_value": 0.5, "is_anomaly": False, "reason": None},
        {"index": 1, "problem": {"type": "/problems/internal-error", "title": "no", "status": 500}},
    ]
    with Client("http://127.0.0.1:1") as service:
        answering(service, lambda _: httpx.Response(200, json={**shared, "items": items}))
        score, problem = service.score_array(np.zeros((2, 28, 28), np.uint8))
        assert isinstance(score, Score)
        assert isinstance(problem, errors.InternalError)
        items.pop(0)
        with pytest.raises(errors.UnexpectedReply):
            service.score_array(np.zeros((2, 28, 28), np.uint8))


def test_the_model_card(server: Server, call: Call) -> None:
    """The card of the default model, of a model and of a version is the Markdown file of the model store."""
    card = (MODEL_STORE / "zero-article/1/report/model-card.md").read_text()
    for model in (None, "zero-article", "zero-article@1"):
        assert call(server.url, "model_card", model) == card
    with pytest.raises(errors.NotFound):
        call(server.url, "model_card", "no/body")


def test_the_calibration(server: Server, call: Call) -> None:
    """The calibration has the threshold of the scores, a histogram of n scores, and ascending operating points."""
    score = call(server.url, "score", EXAMPLES / "zero.png")
    found = call(server.url, "calibration")
    assert (found.model, found.version, found.threshold) == (score.model, score.version, score.threshold)
    assert sum(found.counts) == found.n
    assert len(found.edges) == len(found.counts) + 1
    assert list(found.operating_points) == sorted(found.operating_points)
    assert call(server.url, "calibration", "zero-article@1") == found


def test_the_validity(server: Server, call: Call) -> None:
    """The validity counts the scored images of a model."""
    before = call(server.url, "validity")
    call(server.url, "score", EXAMPLES / "zero.png")
    found = call(server.url, "validity", "zero-article")
    assert (found.model, found.version, found.status, found.reason) == ("zero-article", 1, "valid", None)
    assert found.images == before.images + 1
    assert found.anomalous_interval[0] <= found.anomalous_share <= found.anomalous_interval[1]
    with pytest.raises(errors.NotFound):
        call(server.url, "validity", "no/body")


def test_ready(server: Server, call: Call, make_server: Callable[..., Server], tmp_path: Any) -> None:
    """`ready` is true for a service that can score, and false with the reasons for one that cannot."""
    assert call(server.url, "ready")
    (tmp_path / "store").mkdir()
    environment = {"ANOMALY_MODEL_STORE": str(tmp_path / "store"), "ANOMALY_ALLOW_EMPTY": "true"}
    empty = make_server(**environment).start(wait=False)
    empty.wait_ready("/livez")
    found = call(empty.url, "ready")
    assert not found
    assert found.problems


def test_a_first_connection_that_is_refused_fails_at_once(call: Call) -> None:
    """The error comes without retries, names the address, and states how to start a service."""
    port = free_port()
    started = time.monotonic()
    for method, arguments in (("score", (b"png",)), ("models", ()), ("ready", ())):
        with pytest.raises(ConnectionFailed) as caught:
            call(f"http://127.0.0.1:{port}", method, *arguments)
        for words in (f"http://127.0.0.1:{port} cannot be reached: connection refused", "anomaly serve", "ANOMALY_URL"):
            assert words in str(caught.value)
    assert time.monotonic() - started < 2


def test_a_name_that_is_unknown_fails_at_once(call: Call) -> None:
    """The message about another machine gives no advice about this one."""
    with pytest.raises(ConnectionFailed, match=r"service\.invalid.*check the address") as caught:
        call("http://service.invalid", "score", b"png")
    assert "anomaly serve" not in str(caught.value)


def test_connections_that_break_later_are_retried(zero: bytes) -> None:
    """After one reply, a refused connection is retried; a connection that breaks is retried from the start."""
    replies: list[Any] = []

    def reply(_: httpx.Request) -> httpx.Response:
        following = replies.pop(0)
        if isinstance(following, Exception):
            raise following
        return httpx.Response(200, content=following)

    for replies in (
        [GOOD, httpx.ConnectError("refused"), httpx.ConnectTimeout("late"), GOOD],
        [httpx.RemoteProtocolError("broken"), httpx.ConnectError("refused"), GOOD, httpx.ReadError("broken"), GOOD],
    ):  # fmt: skip
        with Client("http://127.0.0.1:1", retry=Retry(patience=5, first=0.01)) as service:
            answering(service, reply)
            assert isinstance(service.score(zero), Score)
            assert isinstance(service.score(zero), Score)
        assert replies == []
    with Client("http://127.0.0.1:1", retry=Retry(patience=0.2, first=0.01)) as service:
        replies = [GOOD, *[httpx.ConnectError("refused")] * 1000]
        answering(service, reply)
        service.score(zero)
        with pytest.raises(Unreachable):
            service.score(zero)
        assert len(replies) < 999


def test_a_busy_service_is_retried_from_the_first_request(zero: bytes) -> None:
    """A 503 with Retry-After is a connection that works."""
    replies = [httpx.Response(503, headers={"retry-after": "0"}), httpx.Response(200, content=GOOD)]
    with Client("http://127.0.0.1:1") as service:
        answering(service, lambda _: replies.pop(0))
        assert isinstance(service.score(zero), Score)


@pytest.mark.process
def test_the_version_is_that_of_the_project() -> None:
    """`__version__` is the version in pyproject.toml, also where no distribution is installed."""
    expected = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert anomaly.__version__ == expected
    code = "import anomaly; print(anomaly.__version__)"
    bare = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {[p for p in sys.path if 'site-packages' in p]}; "
         "from importlib import metadata; metadata.version = lambda n: (_ for _ in ()).throw("
         f"metadata.PackageNotFoundError(n)); {code}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert bare.stdout.strip() == expected
    with pytest.raises(AttributeError, match="nothing"):
        anomaly.nothing  # noqa: B018


def test_a_problem_of_a_batch_is_a_problem() -> None:
    """`score_array` raises what rejects the whole request."""
    document = {"type": "/problems/unauthorized", "title": "no", "status": 401}
    header = {"content-type": "application/problem+json"}
    with Client("http://127.0.0.1:1") as service:
        answering(service, lambda _: httpx.Response(401, json=document, headers=header))
        with pytest.raises(Problem) as caught:
            service.score_array(digits())
    assert type(caught.value) is errors.Unauthorized
