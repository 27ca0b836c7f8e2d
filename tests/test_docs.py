"""The documentation is complete and its links lead somewhere."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable

import httpx
import pytest
from prometheus_client.metrics import MetricWrapperBase

from app import problems
from app.http.multipart import FIELDS
from app.settings import OF_THE_COMMAND, PREFIX, Settings
from app.stores import BACKENDS
from app.telemetry.metrics import Metrics
from tests.conftest import MODEL_STORE, ROOT, running
from training.data.loaders import LOADERS

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "research").rglob("*.md")])


def test_every_setting_is_documented() -> None:
    """docs/configuration.md has a row for each setting, in the words of the code, and names no other."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    named = set(re.findall(rf"`({PREFIX}[A-Z0-9_]+)`", page))
    assert named == {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | OF_THE_COMMAND
    words = re.findall(r'^    (\w+):.*\n    """((?:.|\n)*?)"""', inspect.getsource(Settings), re.MULTILINE)
    rows = re.findall(rf"^\| `{PREFIX}(\w+)` \| `.*` \| (.*) \|$", page, re.MULTILINE)
    assert rows == [(name.upper(), " ".join(text.split())) for name, text in words]
    assert len(rows) == len(Settings.model_fields)


def test_every_problem_is_documented() -> None:
    """docs/api.md has a row for each problem type: type, status, cause and hint, in the words of the code."""
    page = (ROOT / "docs" / "api.md").read_text()
    kinds = [each for _, each in inspect.getmembers(problems, inspect.isclass) if issubclass(each, problems.Problem)]
    rows = [
        f"| `{kind.type.removeprefix('/problems/')}` | {kind.status} | {inspect.getdoc(kind)} {kind.hint} |"
        for kind in kinds
        if kind is not problems.Problem
    ]
    assert [row for row in rows if row not in page] == []


def test_every_series_is_documented() -> None:
    """docs/api.md has a row for each metric: name, labels, type and meaning, in the words of the code."""
    page = (ROOT / "docs" / "api.md").read_text()
    rows = []
    for series in Metrics().registry._collector_to_names:
        assert isinstance(series, MetricWrapperBase)
        total = "_total" if series._type == "counter" else ""
        labels = ", ".join(f"`{label}`" for label in series._labelnames)
        rows.append(f"| `{series._name}{total}` | {labels} | {series._type} | {series._documentation} |")
    assert len(rows) > 10
    assert [row for row in rows if row not in page] == []


def test_every_variable_of_compose_is_documented() -> None:
    """docs/deployment.md names each variable that docker-compose.yml takes from the environment or `.env`."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    variables = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))
    assert len(variables) > 10
    assert [name for name in sorted(variables) if not re.search(rf"^\|.*`{name}`.*\|$", page, re.MULTILINE)] == []


async def test_every_route_and_parameter_is_documented(client: httpx.AsyncClient) -> None:
    """docs/api.md has a row for each route of the OpenAPI document, and for each parameter of a query, path or form."""
    page = (ROOT / "docs" / "api.md").read_text()
    paths = (await client.get("/openapi.json")).json()["paths"]
    operations = {
        f"{method.upper()} {path}": each for path, methods in paths.items() for method, each in methods.items()
    }
    assert [name for name in operations if f"| `{name}` |" not in page] == []
    named = {parameter["name"] for each in operations.values() for parameter in each.get("parameters", [])} | FIELDS
    rows = "".join(re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE))
    assert sorted(name for name in named - {"id"} if f"`{name}`" not in rows) == []


def test_every_package_is_documented() -> None:
    """docs/architecture.md has a row for each entry of app/, and names no other."""
    folder = ROOT / "app"
    packages = {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").exists()}
    modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("## Packages of `app/`") : page.index("Imports point one way")]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == packages | modules


def test_every_store_is_documented() -> None:
    """docs/configuration.md has a row for each scheme of a store URL, and names no other."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    table = page[page.index("## Stores") : page.index("## When to change a setting")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(BACKENDS)


def test_every_data_set_is_documented() -> None:
    """docs/training.md has a row for each data set."""
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    assert [name for name in LOADERS if name not in rows] == []


def test_alerts_and_dashboard_use_metrics_that_exist() -> None:
    """Every metric of the service in an alert rule or a panel is one that the service exports."""
    known = set()
    for series in Metrics().registry._collector_to_names.values():
        known.update(series)
    for file in ("prometheus/alerts.yml", "grafana/provisioning/dashboards/anomaly.json"):
        used = set(re.findall(r"\banomaly_[a-z0-9_]+", (ROOT / "deploy" / file).read_text()))
        assert used
        assert sorted(used - known) == [], file


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
    """Every relative link and picture of a page exists, and so does the heading that a link names."""
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        if heading and there.suffix == ".md":
            assert heading in _anchors(there.read_text()), f"{target}#{heading}"


def _anchors(markdown: str) -> list[str]:
    """Return what GitHub calls a page's headings: small letters, without signs, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


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
    shipped = Settings.model_fields["default_model"].default
    async with running(make_settings(model_store=MODEL_STORE, default_model=shipped)) as client:
        reply = (await client.post("/score", files={"file": six})).json()
    assert shown.keys() == reply.keys()
    for member in ("model", "version", "threshold", "alpha", "is_anomaly", "reason"):
        assert shown[member] == reply[member], "run python -m benchmarks.write_readme"
    assert shown["mse"] == pytest.approx(reply["mse"], rel=1e-3)
    assert shown["p_value"] == pytest.approx(reply["p_value"], abs=2e-3)
    assert text.count(shown["id"]) == 3
