"""The messages of the command fit the command: no HTTP terms for offline scoring, options instead of parameters."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from anomaly import Problem, UnreadableImage
from anomaly.cli.messages import explain, in_one_line
from anomaly.client import errors
from app import problems
from tests.cli.conftest import Anomaly
from tests.conftest import EXAMPLES, MODEL_STORE, Server, free_port

HTTP = re.compile(r"GET /|POST /|Retry-After|header|\bform\b|fit=|query|request|/docs|X-API-Key|/score", re.IGNORECASE)
STORE = ("--model-store", MODEL_STORE)
KINDS = [kind for _, kind in inspect.getmembers(problems, inspect.isclass) if issubclass(kind, problems.Problem)]
ABOUT_IMAGES = (problems.InvalidImage, problems.InvalidParameter, problems.ModelNotFound, problems.EmptyBody)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Return a photo that is larger than the service accepts without fitting."""
    path = tmp_path / "photo.png"
    Image.effect_noise((400, 400), 80).save(path)
    assert path.stat().st_size > 70_000
    return path


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, ABOUT_IMAGES)], ids=lambda k: k.__name__)
@pytest.mark.parametrize("fit", ["strict", "mnist"])
def test_offline_no_message_mentions_http(kind: type[problems.Problem], fit: str) -> None:
    """Offline, neither title nor hint of a problem mentions a route, a header or a parameter of HTTP."""
    found = explain(errors.problem(kind.status, kind("").document()), fit=fit, offline=True)  # type: ignore[arg-type]
    assert type(found).__name__ == kind.__name__
    assert not HTTP.search(in_one_line(found))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_programs_read_stays(kind: type[problems.Problem]) -> None:
    """Type, status, detail and request id are those of the service."""
    before = errors.problem(kind.status, kind("why").document("abc"), 3.0)
    after = explain(before)
    assert isinstance(after, Problem)
    for name in ("type", "status", "detail", "request_id", "retry_after"):
        assert getattr(after, name) == getattr(before, name)


def test_other_errors_stay() -> None:
    """An error that is not a problem of the service has the message of the client."""
    error = UnreadableImage("a.png is empty")
    assert explain(error) is error
    assert in_one_line(error) == "a.png is empty"


@pytest.mark.parametrize("form", ["table", "csv", "json", "jsonl"])
def test_a_photo_that_is_too_large_names_the_option(
    in_process: Anomaly, make_server: type[Server], photo: Path, form: str
) -> None:
    """A 413 for a photo names `--fit mnist`, in every format, and the file instead of a body."""
    server = make_server().start()
    done = in_process("score", photo, "--url", server.url, "-f", form)
    assert done.returncode == 2
    assert "--fit mnist" in done.stdout
    assert "The file is too large" in done.stdout
    assert not HTTP.search(done.stdout.replace(str(photo), ""))


def test_an_image_of_another_size_names_the_option(in_process: Anomaly, tmp_path: Path) -> None:
    """Offline too, an image of the wrong size names `--fit mnist`."""
    Image.new("L", (60, 60)).save(tmp_path / "a.png")
    done = in_process("score", tmp_path / "a.png", *STORE, "-f", "jsonl")
    assert "--fit mnist" in json.loads(done.stdout)["problem"]["hint"]
    assert not HTTP.search(done.stdout.replace(str(tmp_path), ""))


@pytest.mark.parametrize("options", [("--model", "nobody"), ("--alpha", "1e-9"), ("--alpha", "2"), ("--model", "A B")])
def test_offline_options_have_hints_of_the_command(in_process: Anomaly, options: tuple[str, ...]) -> None:
    """An unknown model and a rate that is not supported are errors without `GET /models`."""
    done = in_process("score", EXAMPLES / "zero.png", *STORE, *options)
    assert done.returncode == 2
    assert "hint: " in done.stderr
    assert not HTTP.search(done.stderr)


def test_a_service_that_is_not_there(in_process: Anomaly) -> None:
    """The message of `score` and `models` names the address, how to start a service, and the variable."""
    url = f"http://127.0.0.1:{free_port()}"
    for command in (("score", EXAMPLES / "zero.png"), ("models",)):
        done = in_process(*command, "--url", url)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        for words in (url, "anomaly serve", "ANOMALY_URL"):
            assert words in done.stderr
