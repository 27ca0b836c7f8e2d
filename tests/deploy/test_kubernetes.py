"""The Kubernetes manifests render, fit the schemas, and are hardened. Nothing here needs a cluster."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import kubernetes_validate
import pytest
import yaml

from app.settings import PREFIX, Settings
from app.telemetry.metrics import Metrics
from tests.conftest import ROOT
from tests.deploy.manifests import (
    COMPONENTS,
    FOLDERS,
    KUBERNETES,
    MARGIN,
    SHUTDOWN_LIMIT,
    Document,
    environment,
    faults,
    kubectl,
    of_kind,
    pods,
    render,
)

HERE = Path(__file__).parent
VERSIONS = ("1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
CUSTOM = ("Gateway", "HTTPRoute", "ScaledObject", "ServiceMonitor")
OF_KSERVE = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "labels", "deploymentStrategy"}
"""Fields of a predictor that are not of a pod, checked by hand against the definition in KServe 0.20."""
CHECKOV = Path(sys.prefix) / "checkov" / "bin" / "checkov"


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Document]]:
    """Return what each folder renders to."""
    return {name: render(folder) for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """Return the base with all components, in a kustomization as docs/kubernetes.md shows it."""
    folder = tmp_path_factory.mktemp("cluster")
    base = os.path.relpath(KUBERNETES, folder.resolve())
    lines = [
        "apiVersion: kustomize.config.k8s.io/v1beta1",
        "kind: Kustomization",
        f"resources: [{base}/base]",
        "components:",
        *(f"  - {base}/components/{component.name}" for component in COMPONENTS),
        "images: [{name: anomaly-api, newName: images.example.org/anomaly-api, newTag: 1.2.3}]",
    ]
    (folder / "kustomization.yaml").write_text("\n".join(lines))
    return render(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_manifests_have_no_faults(rendered: dict[str, list[Document]], name: str) -> None:
    """Each folder has a workload, and everything that `faults` asks for."""
    assert list(pods(rendered[name]))
    assert faults(rendered[name]) == []


def test_components_combine(everything: list[Document]) -> None:
    """All components together have no fault, one autoscaler, and the image that the operator names."""
    assert faults(everything) == []
    assert [each["kind"] for each in of_kind(everything, "ScaledObject", "HorizontalPodAutoscaler")] == ["ScaledObject"]
    assert set(CUSTOM) < {each["kind"] for each in everything}
    images = {container["image"] for _, _, pod in pods(everything) for container in pod["containers"]}
    assert images == {"images.example.org/anomaly-api:1.2.3"}
    assert environment(everything)["ANOMALY_MODEL_STORE"] == "/models"
    assert environment(everything)["ANOMALY_DEVICE"] == "cuda"


@pytest.mark.parametrize("name", FOLDERS)
def test_manifests_fit_the_schemas(rendered: dict[str, list[Document]], name: str) -> None:
    """Every built-in kind fits the strict schemas of six Kubernetes versions; no other kind is left unchecked."""
    own = [each for each in rendered[name] if each["kind"] not in (*CUSTOM, "InferenceService")]
    own += [_as_deployment(each) for each in of_kind(rendered[name], "InferenceService")]
    for version in VERSIONS:
        for document in own:
            kubernetes_validate.validate(document, version, strict=True)


def test_an_unknown_field_does_not_fit(rendered: dict[str, list[Document]]) -> None:
    """The schemas are strict: a misspelt field of a pod or of a KServe predictor is an error."""
    (deployment,) = of_kind(rendered["base"], "Deployment")
    (service,) = of_kind(rendered["kserve"], "InferenceService")
    service["spec"]["predictor"]["enableServiceLink"] = False
    for document in ({**deployment, "specs": {}}, _as_deployment(service)):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
    del service["spec"]["predictor"]["enableServiceLink"]


def _as_deployment(service: Document) -> Document:
    """Return a Deployment with the pod of an InferenceService: no published schema for validators has its kind."""
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    predictor = service["spec"]["predictor"]
    labels = predictor["labels"]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": service["metadata"],
        "spec": {
            "strategy": predictor["deploymentStrategy"],
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {key: value for key, value in predictor.items() if key not in OF_KSERVE},
            },
        },
    }


def test_kserve_runs_the_pod_of_the_base(rendered: dict[str, list[Document]]) -> None:
    """The pod of the InferenceService differs from the Deployment's in the name of its container only."""
    (service,) = of_kind(rendered["kserve"], "InferenceService")
    (deployment,) = of_kind(rendered["base"], "Deployment")
    (autoscaler,) = of_kind(rendered["base"], "HorizontalPodAutoscaler")
    predictor = service["spec"]["predictor"]
    theirs, ours = _as_deployment(service)["spec"]["template"], copy.deepcopy(deployment["spec"]["template"])
    assert predictor["containers"][0]["name"] == "kserve-container"
    ours["spec"]["containers"][0]["name"] = "kserve-container"
    assert theirs == ours
    assert [predictor[key] for key in ("minReplicas", "maxReplicas")] == [
        autoscaler["spec"][key] for key in ("minReplicas", "maxReplicas")
    ]
    assert of_kind(rendered["kserve"], "Deployment", "Service", "HorizontalPodAutoscaler") == []


@pytest.fixture(scope="module")
def custom_faults() -> Callable[[list[Document]], list[str]]:
    """Return a function that validates custom resources with the npm packages of the lock file."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    # One of several test processes installs: `npm ci` first removes the files that the others read.
    with (HERE / "package-lock.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (HERE / "node_modules" / ".package-lock.json").exists():
            command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
            subprocess.run(command, cwd=HERE, check=True, timeout=120)

    def check(documents: list[Document]) -> list[str]:
        command = ["node", str(HERE / "custom_resources.mjs")]
        run = subprocess.run(
            command, input=json.dumps(documents), capture_output=True, text=True, timeout=60, check=False
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    return check


def test_custom_resources_fit_their_schemas(
    everything: list[Document], custom_faults: Callable[[list[Document]], list[str]]
) -> None:
    """Gateway, HTTPRoute, ScaledObject and ServiceMonitor have the fields of their kinds, and no others."""
    custom = of_kind(everything, *CUSTOM)
    assert len(custom) == len(CUSTOM)
    assert custom_faults(custom) == []
    broken = copy.deepcopy(custom)
    for document in broken:
        document["spec"]["misspelt"] = True
    (route,) = of_kind(broken, "HTTPRoute")
    route["spec"]["rules"][0]["timeouts"]["request"] = "ten seconds"
    found = custom_faults(broken)
    for document in broken:
        assert f"{document['kind']} reconstruction-anomaly: /spec/misspelt is unknown" in found
    (other,) = [fault for fault in found if "misspelt" not in fault]
    assert "/timeouts/request" in other


def _remove(path: str) -> Callable[[list[Document]], None]:
    """Return a mutation that removes a field of the pod, or of its container where the path begins with a dot."""

    def mutate(documents: list[Document]) -> None:
        for _, _, pod in pods(documents):
            place = pod["containers"][0] if path.startswith(".") else pod
            *above, last = path.strip(".").split(".")
            for name in above:
                place = place[name]
            place.pop(last, None)

    return mutate


def _drop(kind: str, name: str) -> Callable[[list[Document]], None]:
    """Return a mutation that removes a document."""

    def mutate(documents: list[Document]) -> None:
        documents[:] = [each for each in documents if (each["kind"], each["metadata"]["name"]) != (kind, name)]

    return mutate


def _set(name: str, value: str) -> Callable[[list[Document]], None]:
    """Return a mutation that sets an environment variable."""

    def mutate(documents: list[Document]) -> None:
        for _, _, pod in pods(documents):
            variables = pod["containers"][0]["env"]
            variables[:] = [*(each for each in variables if each["name"] != name), {"name": name, "value": value}]

    return mutate


MUTATIONS = {
    **{
        path: _remove(path)
        for path in (
            ".resources",
            ".resources.limits",
            ".resources.limits.cpu",
            ".resources.limits.memory",
            ".resources.requests",
            ".startupProbe",
            ".livenessProbe",
            ".readinessProbe",
            ".lifecycle",
            ".lifecycle.preStop",
            ".securityContext",
            ".securityContext.allowPrivilegeEscalation",
            ".securityContext.readOnlyRootFilesystem",
            ".securityContext.capabilities",
            ".volumeMounts",
            "securityContext",
            "securityContext.runAsNonRoot",
            "securityContext.runAsUser",
            "securityContext.seccompProfile",
            "enableServiceLinks",
            "automountServiceAccountToken",
            "terminationGracePeriodSeconds",
            "topologySpreadConstraints",
        )
    },
    "default-deny": _drop("NetworkPolicy", "default-deny"),
    "NetworkPolicy": _drop("NetworkPolicy", "reconstruction-anomaly"),
    "PodDisruptionBudget": _drop("PodDisruptionBudget", "reconstruction-anomaly"),
    "a setting that does not exist": _set("ANOMALY_DRAIN_SECOND", "5"),
    "no drain": _set("ANOMALY_DRAIN_SECONDS", "0"),
    "a longer drain": _set("ANOMALY_DRAIN_SECONDS", "6"),
    "more workers": _set("ANOMALY_WORKERS", "2"),
    "a password in the environment": _set("REDIS_PASSWORD", "x"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["base", "kserve"])
def test_a_mutation_is_a_fault(rendered: dict[str, list[Document]], name: str, mutation: str) -> None:
    """Removing any part of the hardening makes `faults` report something."""
    documents = copy.deepcopy(rendered[name])
    MUTATIONS[mutation](documents)
    assert documents != rendered[name]
    assert faults(documents)


def test_a_service_that_injects_settings_is_a_fault(rendered: dict[str, list[Document]]) -> None:
    """A Service named `anomaly` or `anomaly-api` is reported: its variables would begin with ANOMALY_."""
    for name in ("anomaly", "anomaly-api"):
        documents = copy.deepcopy(rendered["base"])
        of_kind(documents, "Service")[0]["metadata"]["name"] = name
        assert faults(documents)


def test_settings_of_the_manifests_are_valid(
    rendered: dict[str, list[Document]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service accepts the environment of each folder."""
    for documents in rendered.values():
        with monkeypatch.context() as context:
            variables = environment(documents)
            assert len(variables) > 5
            for name, value in variables.items():
                assert name.removeprefix(PREFIX).lower() in Settings.model_fields
                context.setenv(name, value)
            assert Settings().port == 8000


def test_the_queue_metric_exists(rendered: dict[str, list[Document]]) -> None:
    """The query of the ScaledObject names a gauge of the service."""
    (scaled,) = of_kind(rendered["keda"], "ScaledObject")
    (name,) = re.findall(r"\b(anomaly_\w+)\{", scaled["spec"]["triggers"][0]["metadata"]["query"])
    gauges = {series._name for series in Metrics().registry._collector_to_names if series._type == "gauge"}
    assert name in gauges


async def test_routes_are_those_of_the_service(rendered: dict[str, list[Document]], client: httpx.AsyncClient) -> None:
    """The gateway passes on every path of the OpenAPI document except those that need no key, and waits long enough."""
    (route,) = of_kind(rendered["gateway"], "HTTPRoute")
    matches = [match for rule in route["spec"]["rules"] for match in rule["matches"] if "queryParams" not in match]

    def routed(path: str) -> bool:
        return any(
            path == match["path"]["value"]
            or (match["path"]["type"] == "PathPrefix" and path.startswith(match["path"]["value"] + "/"))
            for match in matches
        )

    paths = set((await client.get("/openapi.json")).json()["paths"]) | {"/", "/docs", "/page/x", "/openapi.json"}
    assert {path for path in paths if not routed(path)} == {"/livez", "/readyz", "/metrics"}
    assert len(matches) == len({match["path"]["value"] for match in matches})
    settings = Settings()
    for rule in route["spec"]["rules"]:
        request, backend = (int(rule["timeouts"][key].removesuffix("s")) for key in ("request", "backendRequest"))
        assert request >= backend > (settings.deadline_ms + settings.store_timeout_ms) / 1000


def test_compose_leaves_time_for_the_whole_shutdown() -> None:
    """The engine kills a replica only after all phases of its shutdown could end."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()
    replicas = [each for each in services if "ANOMALY_DRAIN_SECONDS" in each.get("environment", {})]
    assert replicas
    for each in replicas:
        drain = float(each["environment"]["ANOMALY_DRAIN_SECONDS"])
        assert float(each["stop_grace_period"].removesuffix("s")) >= drain + SHUTDOWN_LIMIT + MARGIN


def test_the_job_fills_the_volume_as_compose_does(rendered: dict[str, list[Document]]) -> None:
    """The Job's script is the one of docker-compose.yml; the service mounts the volume read-only."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    (job,) = of_kind(rendered["models-volume"], "Job")
    (deployment,) = of_kind(rendered["models-volume"], "Deployment")
    script = compose["services"]["models"]["command"][-1].replace("$$", "$")
    assert job["spec"]["template"]["spec"]["containers"][0]["command"] == ["sh", "-euc", script]
    pod = deployment["spec"]["template"]["spec"]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "models"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == "models"]
    assert mount["readOnly"] is True
    assert volume["persistentVolumeClaim"]["readOnly"] is True


def test_no_secret_is_in_the_manifests(tmp_path: Path, everything: list[Document]) -> None:
    """Every Secret is named only, and docs/kubernetes.md has the command that makes it, which works."""
    named = {
        volume["secret"]["secretName"]
        for _, _, pod in pods(everything)
        for volume in pod["volumes"]
        if "secret" in volume
    } | {
        reference["name"]
        for gateway in of_kind(everything, "Gateway")
        for listener in gateway["spec"]["listeners"]
        for reference in listener["tls"]["certificateRefs"]
    }
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    commands = dict(re.findall(r"^ *\$ kubectl -n anomaly (create secret \w+ (\S+) [^\\\n]*)$", page, re.MULTILINE))
    assert named == set(commands.values())
    subprocess.run([ROOT / "deploy" / "secrets"], env=os.environ | {"SECRETS": str(tmp_path)}, check=True, timeout=60)
    (tmp_path / "certificate.pem").rename(tmp_path / "tls.crt")
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "tls" / "tls.pem", "-out", tmp_path / "tls.key"], check=True)
    keys = {}
    for command, name in commands.items():
        words = [word.replace("secrets/", f"{tmp_path}/") for word in command.split()]
        made = subprocess.run(
            [kubectl(), "-n", "anomaly", *words, "--dry-run=client", "--output=json"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        keys[name] = set(json.loads(made.stdout)["data"])
    variables = environment(everything)
    assert keys["anomaly-api-keys"] == {Path(variables["ANOMALY_API_KEYS_FILE"]).name}
    assert keys["anomaly-redis"] == {Path(variables["ANOMALY_STORE_PASSWORD_FILE"]).name}
    assert keys["anomaly-tls"] == {"tls.crt", "tls.key"}


def test_checkov_finds_nothing_else(
    tmp_path: Path, rendered: dict[str, list[Document]], everything: list[Document]
) -> None:
    """What checkov finds in the rendered manifests is in accepted_findings.yaml, and all of that list is found."""
    if not CHECKOV.exists():
        pytest.skip("checkov is not installed; run `make checkov`")
    for name, documents in {**rendered, "everything": everything}.items():
        own = [_as_deployment(each) if each["kind"] == "InferenceService" else each for each in documents]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(own))
    command = [str(CHECKOV), "--framework", "kubernetes", "--directory", str(tmp_path), "--output", "json"]
    run = subprocess.run(
        [*command, "--skip-download", "--soft-fail"], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 100
    files = {check["file_path"] for check in report["results"]["passed_checks"]}
    assert files == {f"/{path.name}" for path in tmp_path.glob("*.yaml")}
    found = {check["check_id"] for check in report["results"]["failed_checks"]}
    accepted = yaml.safe_load((HERE / "accepted_findings.yaml").read_text())
    assert found == set(accepted)
