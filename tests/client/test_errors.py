"""Problem documents become exceptions of a tree that mirrors the service's."""

from __future__ import annotations

import ast
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from anomaly.client import errors
from app import problems
from tests.conftest import ROOT


def kinds(parent: type) -> list[type]:
    """Return all subclasses, theirs included."""
    return [kind for each in parent.__subclasses__() for kind in (each, *kinds(each))]


def of_the_service() -> list[type[problems.Problem]]:
    """Return the service's kinds of problem, without those that tests define."""
    return [kind for kind in kinds(problems.Problem) if kind.__module__.startswith("app.problems")]


@pytest.mark.parametrize("kind", of_the_service(), ids=lambda kind: kind.__name__)
def test_every_problem_of_the_service_has_its_exception(kind: type[problems.Problem]) -> None:
    """Each problem type becomes the exception of its name, whose parent has the name of the problem's parent."""
    found = errors.problem(kind.status, kind("what is wrong").document("abc123"))
    assert type(found).__name__ == kind.__name__, "anomaly/client/errors.py lacks this class"
    assert type(found).__mro__[1].__name__ == kind.__mro__[1].__name__
    assert (found.status, found.type, found.title) == (kind.status, kind.type, kind.title)
    assert (found.detail, found.hint, found.request_id) == ("what is wrong", kind.hint, "abc123")
    assert str(found) == f"{kind.title}: what is wrong"


@pytest.mark.parametrize(
    ("status", "parent"),
    [(400, errors.MalformedRequest), (404, errors.NotFound), (422, errors.InvalidImage), (429, errors.RateLimited),
     (503, errors.Overloaded), (418, errors.Problem)],
)  # fmt: skip
def test_a_type_of_the_future_becomes_the_class_of_its_status(status: int, parent: type[errors.Problem]) -> None:
    """A problem type that this client does not know raises the class of its status."""
    assert type(errors.problem(status, {"type": "/problems/from-the-future", "title": "New"})) is parent


def test_a_document_that_is_none_is_still_an_error() -> None:
    """A gateway's reply without any document keeps its status and gets words."""
    found = errors.problem(503, {}, retry_after=7.0)
    assert (str(found), found.type, found.retry_after, found.request_id) == ("HTTP 503", "about:blank", 7.0, None)


def test_every_error_can_be_pickled_and_copied() -> None:
    """An error keeps all its attributes in a process pool, `copy` and `deepcopy`."""
    document = {"type": "/problems/x", "title": "No", "detail": "why", "hint": "how", "instance": "urn:request:abc"}
    of_problems = [kind(422, document, 7.0) for kind in (errors.Problem, *kinds(errors.Problem))]
    for error in (*of_problems, errors.UnreadableImage("no"), errors.TimedOut("late")):
        error.add_note("seen twice")
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(again) is type(error)
            assert (str(again), vars(again)) == (str(error), vars(error))


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """The drawing at the top of anomaly/client/errors.py names every class, and none that is not there."""
    source = (ROOT / "anomaly" / "client" / "errors.py").read_text()
    drawing = ast.get_docstring(ast.parse(source)) or ""
    names = {kind.__name__ for kind in kinds(errors.ServiceError) if kind.__module__ == "anomaly.client.errors"}
    drawn = {word.strip(",") for line in drawing.splitlines() if line.lstrip().startswith(("├", "└", "│"))
             for word in line.split() if word.strip(",").isidentifier() and word[0].isupper()}  # fmt: skip
    assert drawn - {"RFC", "Problem"} == names - {"Problem"}


@pytest.mark.process
def test_importing_the_client_imports_nothing_heavy() -> None:
    """`import anomaly` imports only httpx, itself and a few standard modules, so that it starts quickly."""

    def loaded(module: str) -> set[str]:
        code = f"import {module}, sys; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    httpx = loaded("httpx")
    assert httpx.isdisjoint({"torch", "numpy", "pydantic", "PIL", "fastapi", "starlette"})
    more = loaded("anomaly") - httpx
    assert {name.partition(".")[0] for name in more} - sys.stdlib_module_names == {"anomaly"}
    assert len(more) < 80


@pytest.mark.parametrize("path", sorted((ROOT / "anomaly" / "client").glob("*.py")), ids=lambda path: path.name)
def test_the_client_knows_only_itself_and_httpx(path: Path) -> None:
    """No module of the client imports anything but the standard library, httpx and the client, not even late."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.partition(".")[0]
            assert root in {"httpx", "anomaly"} or root in sys.stdlib_module_names, name


def test_the_client_is_typed() -> None:
    """The package carries the marker that lets type checkers read it, and setuptools ships it."""
    assert (ROOT / "anomaly" / "py.typed").exists()
    assert 'anomaly = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()
