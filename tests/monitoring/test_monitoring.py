"""Metrics, alert rules and dashboard: checked by promtool, and queried in a Prometheus with the service under load."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import pngs
from tests.app.http.test_batch import digits, npy
from tests.conftest import ROOT, Server, free_port, interop
from tests.gateway.process import gateway, make_secrets
from tests.infer_requests import json_request
from tests.otlp import receiving
from tests.waiting import wait_until

RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "provisioning" / "dashboards" / "anomaly.json"
PANELS = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str | Path, given: str = "") -> str:
    """Run promtool and return its output; fail with it if promtool fails."""
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Server]]:
    """Yield a client of a Prometheus that scrapes a service and a gateway under load, and a replica that is down.

    The service sends its traces to a receiver, so that its histogram has exemplars. The alert rules are the shipped
    ones without their waiting times, so that one of them fires.
    """
    folder, port = tmp_path_factory.mktemp("monitoring"), free_port()
    with ExitStack() as ends:
        key = make_secrets(folder)
        receiver = ends.enter_context(receiving())
        server = Server(
            folder,
            ANOMALY_API_KEYS_FILE=str(folder / "keys" / "api_keys"),
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        )
        ends.callback(server.kill)
        server.start()
        door = ends.enter_context(gateway(folder, server.port, key))
        (folder / "alerts.yml").write_text(re.sub(r"for: \w+", "for: 0s", RULES.read_text()))
        jobs = {"api": [server.port, free_port()], "gateway": [door.metrics_port]}
        configuration = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
            "rule_files": [str(folder / "alerts.yml")],
            "scrape_configs": [
                {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{each}" for each in ports]}]}
                for name, ports in jobs.items()
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"],
                stdout=log, stderr=log,
            )  # fmt: skip
        ends.callback(process.wait, 10)
        ends.callback(process.kill)
        stop = threading.Event()
        load = threading.Thread(target=_send, args=(door.client(), stop))
        load.start()
        ends.callback(load.join, 30)
        ends.callback(stop.set)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_until(lambda: _is_ready(client), describe=(folder / "prometheus.log").read_text)
            yield client, server


def _is_ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/-/ready").status_code == 200
    return False


def _send(client: httpx.Client, stop: threading.Event) -> None:
    """Send requests of each kind until `stop` is set."""
    images = digits(40)
    with client:
        while not stop.is_set():
            for image in images[:4]:
                client.post("/score", content=pngs.plain(image), headers={"content-type": "image/png"})
            client.post("/score", content=b"no image", headers={"content-type": "image/png"})
            client.post("/score/batch", content=npy(images), headers={"content-type": "application/x-npy"})
            client.post("/v2/models/zero/infer", json=json_request(images[:3]))


def query(client: httpx.Client, expression: str) -> list[float]:
    """Return the values of an instant query."""
    reply = client.get("/api/v1/query", params={"query": expression})
    assert reply.status_code == 200, reply.text
    found: list[dict[str, Any]] = reply.json()["data"]["result"]
    return [float(series["value"][1]) for series in found]


@interop
def test_every_panel_has_data(prometheus: tuple[httpx.Client, Server]) -> None:
    """Each query of the dashboard returns numbers for the service under load."""
    client, _ = prometheus
    missing = set(EXPRESSIONS)
    assert len(PANELS) > 20

    def complete() -> bool:
        for title, expression in sorted(missing):
            if any(math.isfinite(value) for value in query(client, expression)):
                missing.remove((title, expression))
        return not missing

    wait_until(complete, 60, describe=lambda: missing)
    assert query(client, 'sum(ALERTS{alertname="ReplicaDown",alertstate="firing"})') == [1]
    rules = client.get("/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}


@interop
def test_exemplars_name_traces(prometheus: tuple[httpx.Client, Server]) -> None:
    """Prometheus stores exemplars of the latency histogram, whose traces are those in the log of the service."""
    client, server = prometheus
    asked = {"query": 'anomaly_http_request_duration_seconds_bucket{route="/score"}', "start": "0", "end": "9999999999"}

    def exemplars() -> list[dict[str, Any]]:
        reply = client.get("/api/v1/query_exemplars", params=asked)
        assert reply.status_code == 200, reply.text
        return [each for series in reply.json()["data"] for each in series["exemplars"]]

    wait_until(exemplars, describe=server.log)
    found = exemplars()[0]
    trace_id = found["labels"]["trace_id"]
    wait_until(lambda: trace_id in server.log(), describe=server.log)
    (line,) = [json.loads(line) for line in server.log().splitlines() if trace_id in line]
    assert line["route"] == "/score" and line["seconds"] == pytest.approx(float(found["value"]), abs=1e-6)


@interop
def test_metrics_follow_the_conventions(prometheus: tuple[httpx.Client, Server]) -> None:
    """`promtool check metrics` finds no fault in the metrics of a service under load."""
    _, server = prometheus
    exposition = server.get("/metrics").text
    assert "anomaly_build_info{version=" in exposition
    assert promtool("check", "metrics", given=exposition) == ""


def test_promtool_accepts_the_rules() -> None:
    """Each alert rule is valid, and has a row in docs/deployment.md with an action."""
    assert "SUCCESS" in promtool("check", "rules", RULES)
    page = (ROOT / "docs" / "deployment.md").read_text()
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert [name for name in alerts if f"| `{name}` |" not in page] == []


@interop
def test_rules_pass_their_unit_tests(tmp_path: Path) -> None:
    """The unit tests of the alert rules pass, and there is one for each rule."""
    tests = (ROOT / "tests" / "containers" / "alerts.yml").read_text()
    assert set(re.findall(r"- alert: (\w+)", RULES.read_text())) == set(re.findall(r"alertname: (\w+)", tests))
    (tmp_path / "tests.yml").write_text(tests.replace("/rules/alerts.yml", str(RULES)))
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "tests.yml")


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    """promtool accepts the shipped configuration."""
    assert "SUCCESS" in promtool("check", "config", ROOT / "deploy" / "prometheus" / "prometheus.yml")


def test_panels_do_not_overlap() -> None:
    """Every panel has a unique id, a unique place, and a unit."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
