"""The documentation is complete and its links lead somewhere."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable

import httpx
import pytest

from app import problems
from app.metrics import Metrics
from app.settings import PREFIX, Settings
from tests.conftest import ROOT, running

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_every_setting_is_documented() -> None:
    """A setting that docs/configuration.md does not mention does not exist, nor the other way round."""
    documented = set(re.findall(rf"`({PREFIX}[A-Z0-9_]+)`", (ROOT / "docs" / "configuration.md").read_text()))
    assert documented == {f"{PREFIX}{name}".upper() for name in Settings.model_fields}


def test_every_problem_is_documented() -> None:
    """docs/api.md explains each problem type that the service can answer, with its status."""
    page = (ROOT / "docs" / "api.md").read_text()
    kinds = [each for _, each in inspect.getmembers(problems, inspect.isclass) if issubclass(each, problems.Problem)]
    missing = [
        kind.type for kind in kinds if f"| `{kind.type.removeprefix('/problems/')}` | {kind.status} |" not in page
    ]
    assert missing == []


def test_every_series_is_documented() -> None:
    """docs/configuration.md's neighbour for operators names every metric."""
    page = (ROOT / "docs" / "api.md").read_text()
    names = {family.name for family in Metrics().registry.collect()}
    assert [name for name in sorted(names) if f"`{name}" not in page] == []


async def test_every_route_is_documented(client: httpx.AsyncClient) -> None:
    """docs/api.md names each route of the OpenAPI document."""
    page = (ROOT / "docs" / "api.md").read_text()
    document = (await client.get("/openapi.json")).json()
    assert [path for path in document["paths"] if f"{path}`" not in page] == []


def test_every_dependency_is_justified_and_pinned() -> None:
    """Each dependency of pyproject.toml has its line in docs/dependencies.md and its pin in constraints.txt."""
    project = (ROOT / "pyproject.toml").read_text()
    requirements = re.findall(r'"([A-Za-z0-9-]+)(?:\[[a-z,]+\])?>=', project)
    page = (ROOT / "docs" / "dependencies.md").read_text()
    pins = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().split()
    }
    names = {name for name in requirements if name != "setuptools"}
    assert len(names) > 10
    assert [name for name in sorted(names) if f"`{name}`" not in page or name.lower() not in pins] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page) -> None:
    """Every relative link and picture of a page exists."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_nothing_of_one_machine_is_in_the_docs() -> None:
    """No page names a path of the machine that it was written on."""
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp)/", page.read_text()), page


async def test_the_readme_answers_as_the_model_does(make_settings: Callable[..., Settings], six: bytes) -> None:
    """The reply in README.md is the one that the shipped default model gives to the shipped six."""
    text = (ROOT / "README.md").read_text()
    shown = json.loads(
        text[text.index("{", text.index("$ curl -F file=@examples/six.png")) : text.index("\n$ curl -o")]
    )
    async with running(make_settings(default_model=Settings.model_fields["default_model"].default)) as client:
        reply = (await client.post("/score", files={"file": six})).json()
    assert shown.keys() == reply.keys()
    for member in ("model", "version", "threshold", "alpha", "is_anomaly", "reason"):
        assert shown[member] == reply[member], "run python -m benchmarks.write_readme"
    assert shown["mse"] == pytest.approx(reply["mse"], rel=1e-3)
    assert shown["p_value"] == pytest.approx(reply["p_value"], abs=2e-3)
    assert text.count(shown["id"]) == 3
