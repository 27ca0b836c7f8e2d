"""The shipped stack in containers: images, hardening, rejected requests, and faults under load. Order matters."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import socket
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from app.http.auth import ApiKeys, KeysError
from app.settings import Settings
from tests.conftest import EXAMPLES, ROOT
from tests.containers.images import run
from tests.containers.stack import BATCH_MAX_BYTES, PNG_, PROJECT, SCAN, TRAIN, Load, Stack
from tests.waiting import wait_until

pytestmark = pytest.mark.containers
IMAGES = ("api", "gateway", "redis", "prometheus", "train")
NPY = {"content_type": "application/x-npy"}
PROFILES = ((), ("train",), ("observability",), ("gpu",), ("train", "observability", "gpu"))
FETCH = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())"
PROMOTE = """
import json, pathlib, shutil
model = pathlib.Path("/models/zero")
if not (model / "2").exists():
    shutil.copytree(model / "1", model / ".staging-2")
    manifest = json.loads((model / ".staging-2/manifest.json").read_text())
    (model / ".staging-2/manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    (model / ".staging-2").rename(model / "2")
(model / ".CURRENT").write_text("%d\\n")
(model / ".CURRENT").rename(model / "CURRENT")
"""


def test_dockerfiles_are_clean(stack: Stack) -> None:
    """hadolint finds no fault in any Dockerfile."""
    files = [str(path) for path in (ROOT / "Dockerfile", *ROOT.glob("deploy/*/Dockerfile"))]
    assert len(files) == 4
    assert run(os.environ["HADOLINT"], *files).stdout == ""


@pytest.mark.parametrize("profiles", PROFILES, ids="+".join)
def test_compose_file_is_valid(stack: Stack, profiles: tuple[str, ...]) -> None:
    """Compose accepts the file with every profile, and the sources and targets, which it does not check, exist."""
    options = [option for profile in profiles for option in ("--profile", profile)]
    config = json.loads(stack.compose(*options, "config", "--format", "json").stdout)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for name, service in config["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["pids_limit"] == 128, name
        assert service["logging"]["options"]["max-size"] == "10m", name
        assert service.get("build", {}).get("target", "api") in stages
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), volume
        if name not in {"models", "train"}:
            folder = service.get("build", {}).get("context", str(ROOT))
            assert "healthcheck" in service or "HEALTHCHECK" in Path(folder, "Dockerfile").read_text(), name
        waited_for = {each: needed["condition"] for each, needed in service.get("depends_on", {}).items()}
        assert waited_for.pop("models", "service_completed_successfully") == "service_completed_successfully"
        assert set(waited_for.values()) <= {"service_healthy"}, name
    for secret in config["secrets"].values():
        assert Path(secret["file"]).is_file()


def test_compose_and_service_agree(stack: Stack) -> None:
    """By default compose serves the service's default model, and gateway and service have the same limits."""
    without = dict.fromkeys(("BATCH_MAX_BYTES", "FIT_MAX_BYTES", "DEFAULT_MODEL", "API_REPLICAS"), "")
    services = json.loads(stack.compose("config", "--format", "json", **without).stdout)["services"]
    api, gateway = services["api"]["environment"], services["gateway"]["environment"]
    default = {name: field.default for name, field in Settings.model_fields.items()}
    assert api["ANOMALY_DEFAULT_MODEL"] == default["default_model"]
    assert api["ANOMALY_BATCH_MAX_BODY_BYTES"] == gateway["BATCH_MAX_BYTES"] == str(default["batch_max_body_bytes"])
    assert api["ANOMALY_FIT_MAX_BODY_BYTES"] == gateway["FIT_MAX_BYTES"] == str(default["fit_max_body_bytes"])
    assert services["api"]["deploy"]["replicas"] == 2
    words = (ROOT / "deploy/gateway/haproxy.cfg").read_text().split()
    buffer, buffers = (int(words[words.index(f"tune.{name}") + 1]) for name in ("bufsize", "buffers.limit"))
    # Twice, because two workers run during a reload. All other allocations have the remaining 20 % of the memory.
    assert 2 * buffer * buffers < 0.8 * int(services["gateway"]["mem_limit"])
    scaled = json.loads(stack.compose("config", "--format", "json", API_REPLICAS="5").stdout)["services"]
    assert scaled["api"]["deploy"]["replicas"] == 5


@pytest.mark.parametrize("secrets", ["", "/nowhere/secrets"], ids=["unset", "missing folder"])
def test_up_without_secrets_says_what_to_do(stack: Stack, secrets: str) -> None:
    """Without secrets, compose fails with one line that names the command that creates them."""
    up = ("compose", "-p", "anomaly-nothing", "--env-file", "/dev/null", "up", "-d", "--no-build", "--pull", "never")
    refused = run(stack.docker, *up, check=False, SECRETS=secrets)
    assert refused.returncode != 0
    assert "make secrets" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not Path("/nowhere").exists()


def test_image_is_small_and_holds_only_the_service(stack: Stack, notes: list[str]) -> None:
    """The CPU image stays below 1.2 GB and has no pip, no compiler, no training code, no tests and no secrets."""
    sizes = {name: stack.inspect(f"anomaly-{name}:dev")["Size"] / 1e9 for name in IMAGES}
    notes.append("image sizes: " + ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items()))
    assert sizes["api"] < 1.2
    container = stack.containers("api")[0]
    for absent in ("pip", "pip3", "gcc", "cc", "make", "curl", "git"):
        assert stack.execute(container, "sh", "-c", f"command -v {absent} || echo none").strip() == "none"
    assert "No module named pip" in stack.execute(container, "python", "-m", "pip", check=False)
    assert stack.execute(container, "ls", "/srv").split() == ["app", "examples", "model_store", "var"]
    config = stack.inspect("anomaly-api:dev")["Config"]
    assert config["StopSignal"] == "SIGTERM" and config["Labels"]["org.opencontainers.image.licenses"] == "MIT"


@pytest.mark.parametrize("service", ["gateway", "api", "redis"])
def test_hardening_is_in_force(stack: Stack, service: str) -> None:
    """Read back from inside: no root, no capability, no new privileges, no writable root, bounded memory."""
    for container in stack.containers(service):
        status = stack.execute(container, "cat", "/proc/1/status")
        assert re.search(r"^Uid:\t1000\d\t1000\d\t", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE) and re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        assert "Read-only file system" in stack.execute(container, "touch", "/srv-written", check=False)
        host = stack.inspect(container)["HostConfig"]
        assert host["Memory"] > 0 and host["NanoCpus"] > 0 and host["PidsLimit"] == 128
    if service == "api":
        assert "Read-only file system" in stack.execute(container, "touch", "/models/written", check=False)


def test_one_port_is_published(stack: Stack) -> None:
    """The engine publishes one port of the stack; it is the gateway's."""
    published = {
        (service, binding["HostPort"])
        for service in ("gateway", "api", "redis")
        for container in stack.containers(service)
        for bindings in stack.inspect(container)["NetworkSettings"]["Ports"].values()
        for binding in bindings or []
    }
    assert published == {("gateway", str(stack.port))}


def listening_ports(stack: Stack, container: str) -> set[int]:
    """Return the TCP ports on which any process of a container listens."""
    table = stack.execute(container, "cat", "/proc/net/tcp", "/proc/net/tcp6")
    return {int(match, 16) for match in re.findall(r"^ *\d+: [0-9A-F]+:([0-9A-F]{4}) \S+ 0A ", table, re.MULTILINE)}


def listening_elsewhere() -> set[int]:
    """Return the ports on which this machine listens for something else than an engine."""
    return {
        connection.laddr.port
        for connection in psutil.net_connections("tcp")
        if connection.status == "LISTEN"
        and not (connection.pid and psutil.Process(connection.pid).name() == "docker-proxy")
    }


def test_a_port_scan_from_another_network_finds_one_port(stack: Stack, notes: list[str]) -> None:
    """From another network the engine has one port open on the host, and no container of the stack has any.

    The ports of the containers are open inside: a process in the network reaches them.
    """
    targets = []
    for service in ("gateway", "api", "redis"):
        for container in stack.containers(service):
            ports = sorted(listening_ports(stack, container))
            networks = stack.inspect(container)["NetworkSettings"]["Networks"]
            assert ports and networks
            targets += [[network["IPAddress"], ports] for network in networks.values()]
    inside = json.loads(stack.inside(SCAN, json.dumps(targets)))
    assert {port for _, port in inside} >= {6379, 8000, 8405, 8443}
    network = f"{PROJECT}-elsewhere"
    run(stack.docker, "network", "create", network)
    try:
        host = json.loads(run(stack.docker, "network", "inspect", network).stdout)[0]["IPAM"]["Config"][0]["Gateway"]
        scanner = ("run", "--rm", "--network", network, "anomaly-api:dev", "python", "-c", SCAN)
        others = listening_elsewhere()
        found = json.loads(run(stack.docker, *scanner, json.dumps([*targets, [host, []]])).stdout)
        others |= listening_elsewhere()
    finally:
        run(stack.docker, "network", "rm", network)
    of_the_host = {port for address, port in found if address == host}
    of_the_stack = [target for target in found if target[0] != host]
    notes.append(
        f"port scan from another network: of 65,535 ports of the host the engine has {sorted(of_the_host - others)}; "
        f"{len(of_the_stack)} ports of the stack's containers answer, to an inside container {len(inside)} do"
    )
    assert of_the_host - others == {stack.port}
    assert of_the_stack == []


def test_journey(stack: Stack) -> None:
    """A zero is scored on one replica; every replica finds its reconstruction; HTTP/2 is spoken."""
    status, headers, reply = stack.score(x_request_id="journey-score")
    assert status == 200 and reply["is_anomaly"] is False and reply["id"]
    assert headers["x-request-id"] == "journey-score" and "forward;dur=" in headers["server-timing"]
    pictures = set()
    for number in range(12):
        status, _, body = stack.ask("GET", reply["reconstruction"], x_request_id=f"journey-{number}")
        assert status == 200 and body.startswith(b"\x89PNG")
        pictures.add(body)
    assert len(pictures) == 1
    replicas = stack.containers("api")
    logs = {replica: stack.logs(replica) for replica in replicas}
    scored = next(replica for replica in replicas if '"journey-score"' in logs[replica])
    fetched = {replica for replica in replicas if re.search(r'"journey-\d+"', logs[replica])}
    assert fetched - {scored}, "no other replica was asked"
    gateway = stack.logs(stack.containers("gateway")[0])
    assert '"request_id":"journey-score"' in gateway and '"key_name":"trial"' in gateway
    address = ("-o", "/dev/null", "-w", "%{http_version}", f"https://localhost:{stack.port}/docs")
    assert run("curl", "-sS", "--cacert", str(stack.secrets / "certificate.pem"), *address).stdout == "2"


def test_no_version_below_tls_1_2(stack: Stack) -> None:
    """The gateway does not speak TLS 1.1, no suite of TLS 1.2 without authenticated encryption, and no plain HTTP."""
    for suite, code in (("ECDHE-ECDSA-AES128-GCM-SHA256", 0), ("ECDHE-ECDSA-AES128-SHA", 35)):
        weak = ("--tls-max", "1.2", "--ciphers", suite, "-o", "/dev/null", f"https://localhost:{stack.port}/docs")
        assert run("curl", "-sSk", *weak, check=False).returncode == code, suite
    old = ("--tls-max", "1.1", "--ciphers", "ALL:@SECLEVEL=0", f"https://localhost:{stack.port}/docs")
    assert run("curl", "-sSk", *old, check=False).returncode == 35
    with socket.create_connection(("localhost", stack.port), 5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        plain.settimeout(10)
        assert not plain.recv(64).startswith(b"HTTP")


def test_a_request_id_carries_nothing_else(stack: Stack) -> None:
    """A header that is no plain id is replaced by a new one, the same in reply, gateway and service."""
    for given in ('ok, x","key_name":"admin', 'x","key_name":"admin, ok', "x" * 65, "one two", ""):
        status, headers, _ = stack.score(x_request_id=given)
        assert status == 200 and re.fullmatch(r"[0-9a-f-]{36}", headers["x-request-id"])
        for service in ("gateway", "api"):
            assert json.loads(stack.logged(service, headers["x-request-id"]))["request_id"] == headers["x-request-id"]
    for container in (*stack.containers("gateway"), *stack.containers("api")):
        log = stack.logs(container)
        assert not re.search(r"admin\b", log)
        assert all(json.loads(line) for line in log.splitlines() if line.startswith("{"))


def test_no_spelling_of_an_inside_path_passes(stack: Stack) -> None:
    """The gateway rejects metrics and probes for any spelling of the path; other paths are forwarded."""
    spellings = (
        "/metrics", "/%6detrics", "/%6Detrics", "//metrics", "/./metrics", "/metrics/", "/metrics%2f", "/metrics%2F..",
        "/x/../metrics", "/x/%2e%2e/metrics", "/%2e/metrics", "/metrics?x", "/metrics;x", "/metrics%00", "/metrics%20",
        "/livez", "/li%76ez", "/readyz/", "/%72eadyz", f"https://localhost:{stack.port}/metrics",
        f"https://localhost:{stack.port}/%6detrics", "/page/../metrics", "/page/..%2fmetrics",
    )  # fmt: skip
    for path in spellings:
        for key in ("", None):
            answer = stack.ask("GET", path, key=key)
            assert refused(answer, 404)["type"] == "/problems/not-found", path
            assert b"anomaly_http_requests" not in answer[2]
    for path in ("/", "/page/page.js", "/models/zero/versions/1/report/model-card.md", "/page/page.js?x="):
        assert stack.ask("GET", path)[0] == 200, path


def test_what_cannot_be_read_is_told_so(stack: Stack) -> None:
    """A malformed body gets a problem with the request id of the log; bytes that are not HTTP get HAProxy's own 400."""

    def send(*pieces: str) -> bytes:
        connection = stack.connect(timeout=10)
        connection.connect()
        for piece in pieces:
            connection.sock.sendall(piece.encode())
            time.sleep(0.2)  # if the pieces arrive together, the gateway rejects the request itself
        answer = b"".join(iter(functools.partial(connection.sock.recv, 4096), b""))
        connection.close()
        return answer

    head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {stack.key}\r\nContent-Type: image/png\r\n"
    answer = send(head + "Transfer-Encoding: chunked\r\n\r\n", "4\r\nabcd\r\n", "no number\r\n").decode()
    headers, _, body = answer.partition("\r\n\r\n")
    (request_id,) = re.findall(r"^x-request-id: ([0-9a-f-]{36})\r$", headers, re.MULTILINE)
    problem = json.loads(body)
    assert (problem["status"], problem["type"]) == (400, "/problems/malformed-request")
    assert problem["instance"] == f"urn:request:{request_id}"
    assert json.loads(stack.logged("gateway", request_id))["status"] == 400
    for text in ("nothing\r\n\r\n", head + "no header\r\n\r\n"):
        answer = send(text).decode()
        assert answer.startswith("HTTP/1.1 400 ") and len(answer) < 300 and stack.key not in answer


def refused(answer: tuple[int, dict[str, str], bytes], status: int) -> dict[str, Any]:
    """Check that an answer is a problem of a status, and return it."""
    assert answer[0] == status, answer
    assert answer[1]["content-type"] == "application/problem+json"
    assert "server" not in answer[1]
    problem: dict[str, Any] = json.loads(answer[2])
    assert problem["status"] == status and problem["type"].startswith("/problems/")
    return problem


def test_refusals(stack: Stack) -> None:
    """A missing or wrong key, an internal route, a large body and a wrong content type get problems."""
    zero = (EXAMPLES / "zero.png").read_bytes()
    for key in (None, "wrong", sha256(stack.key.encode()).hexdigest()):
        answer = stack.ask("POST", "/score", zero, key=key, **PNG_)
        assert refused(answer, 401)["type"] == "/problems/unauthorized"
        assert answer[1]["www-authenticate"].startswith("ApiKey")
    # Without a key, the page is readable, and the gateway does not wait for a body.
    assert stack.ask("GET", "/", key=None)[0] == stack.ask("HEAD", "/docs", key=None)[0] == 200
    refused(stack.ask("POST", "/", b"", key=None, content_length="60000"), 401)
    for path in ("/metrics", "/livez", "/readyz"):
        refused(stack.ask("GET", path), 404)
    assert refused(stack.ask("POST", "/score", b"x" * 65537, **PNG_), 413)["type"] == "/problems/body-too-large"
    refused(stack.ask("POST", "/score", io.BytesIO(b"x" * 90000), **PNG_), 413)
    refused(stack.ask("POST", "/score", zero, content_type="application/x-pickle"), 415)
    refused(stack.ask("POST", "/score", b"GIF89a", **PNG_), 422)
    refused(stack.ask("POST", "/score", b"", **PNG_), 400)
    refused(stack.ask("GET", "/nowhere"), 404)


def picture(side: int) -> bytes:
    """Return the shipped zero, enlarged to `side` pixels and not compressed: a PNG of about side x side bytes."""
    content = io.BytesIO()
    Image.open(EXAMPLES / "zero.png").resize((side, side)).save(content, "PNG", compress_level=0)
    return content.getvalue()


def array(count: int) -> bytes:
    """Return an npy file of black images."""
    content = io.BytesIO()
    np.save(content, np.zeros((count, 28, 28), np.uint8))
    return content.getvalue()


def refused_twice(stack: Stack, path: str, body: bytes, limit: int, kind: dict[str, str]) -> None:
    """Check that a body above the limit is rejected, with a Content-Length and chunked.

    The body is only slightly too large, because a client that still sends when it is rejected may lose the reply.
    """
    assert 0 < len(body) - limit < 8_000
    declared = stack.ask("POST", path, b"", content_length=str(len(body)), **kind)
    for answer in (declared, stack.ask("POST", path, io.BytesIO(body), **kind)):
        assert refused(answer, 413)["type"] == "/problems/body-too-large"


def test_large_images_pass_for_fitting(stack: Stack) -> None:
    """With fit=mnist 300 KB pass the gateway, 2 MiB are the limit, declared or not; without it they are too large."""
    body = picture(560)
    assert 300_000 < len(body) < 2 << 20
    for content in (body, io.BytesIO(body)):
        status, _, reply = stack.ask("POST", "/score?fit=mnist", content, **PNG_)
        assert status == 200 and json.loads(reply)["is_anomaly"] is False
    for path in ("/score", "/score?fit=strict", "/score?fit=", "/score?xfit=mnist"):
        refused(stack.ask("POST", path, b"", content_length=str(len(body)), **PNG_), 413)
    refused_twice(stack, "/score?fit=mnist", picture(1449), 2 << 20, PNG_)


def test_batches_have_one_limit(stack: Stack) -> None:
    """A batch just below the limit is scored, one just above it is rejected, with a Content-Length and chunked."""
    below = array(5_000)
    assert len(below) < BATCH_MAX_BYTES
    for body in (below, io.BytesIO(below)):
        status, _, scores = stack.ask("POST", "/score/batch", body, accept="application/x-npy", **NPY)
        assert status == 200 and np.load(io.BytesIO(scores)).shape == (5_000,)
    refused_twice(stack, "/score/batch", array(5_355), BATCH_MAX_BYTES, NPY)


def test_a_key_in_the_gateway_is_a_key_in_the_service(stack: Stack) -> None:
    """A client inside the network that bypasses the gateway still needs a key."""
    program = (
        "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000); c.request('GET', '/models');"
        "print(c.getresponse().status)"
    )
    assert stack.execute(stack.containers("api")[0], "python", "-c", program).strip() == "401"


def test_slow_clients_are_let_go(stack: Stack) -> None:
    """A client that trickles its headers or image, or stops in a batch, gets 408 or is disconnected within 10 s."""

    def drip(where: str) -> float:
        path = {"large image": "/score?fit=mnist", "batch": "/score/batch"}.get(where, "/score")
        kind = "application/x-npy" if where == "batch" else "image/png"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {stack.key}\r\nContent-Type: {kind}\r\n"
        connection = stack.connect()
        connection.connect()
        began = time.monotonic()
        connection.sock.sendall((head if where == "headers" else head + "Content-Length: 60000\r\n\r\n").encode())
        connection.sock.settimeout(0.5)
        answer = None
        while answer is None and time.monotonic() - began < 12:
            try:
                if where != "batch":  # each piece of a batch has its own time
                    connection.sock.sendall(b"x")
                answer = connection.sock.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                answer = b""
        seconds = time.monotonic() - began
        connection.close()
        assert answer is not None and (answer == b"" or b" 408 " in answer.partition(b"\r\n")[0]), where
        return seconds

    with ThreadPoolExecutor() as pool:
        seconds = list(pool.map(drip, ("headers", "image", "large image", "batch")))
    assert min(seconds) > 4 and max(seconds) < 10


def until(stack: Stack, key: str, wanted: int) -> None:
    """Return when every replica answers a key with a status; fail after ten seconds."""
    wait_until(lambda: all(stack.ask("GET", "/models", key=key)[0] == wanted for _ in range(8)), 10)


def replace(path: Path, text: str) -> None:
    """Replace a file by rename, as an editor or a tool does."""
    path.with_name("new").write_text(text)
    path.with_name("new").replace(path)


def test_key_files_are_read_alike(stack: Stack, tmp_path: Path) -> None:
    """Gateway and service read comments in the same way, and both ignore a malformed file."""
    path = stack.secrets / "keys" / "api_keys"
    before = path.read_text()
    digest = sha256(b"commented").hexdigest()
    replace(path, f'# who may ask\n\n  {digest} \t commented   # since May "admin"\n{before}')
    until(stack, "commented", 200)
    status, headers, _ = stack.ask("GET", "/models", key="commented")
    assert status == 200
    for service in ("gateway", "api"):
        assert json.loads(stack.logged(service, headers["x-request-id"]))["key_name"] == "commented"
    replace(path, f"{before}{digest}\n{sha256(b'third').hexdigest()} third\n")
    (gateway,) = stack.containers("gateway")

    def all_have_checked() -> bool:
        stack.ask("GET", "/models", key="commented")  # a replica checks the file when a request comes
        written = [stack.logs(replica) for replica in stack.containers("api")]
        return "not changed: line 2 of" in stack.logs(gateway) and all("API keys not changed" in log for log in written)

    wait_until(all_have_checked)
    assert stack.ask("GET", "/models", key="third")[0] == 401
    assert stack.ask("GET", "/models", key="commented")[0] == 200
    replace(path, before)
    until(stack, "commented", 401)
    tmp_path.chmod(0o755)
    gateway = ("run", "--rm", "--network", "none", "-v", f"{tmp_path}:/run/keys:ro", "anomaly-gateway:dev")
    for wrong in (f"{digest.upper()} commented", f"{digest} commented twice", f"{digest} a\u00e4", f"{digest}# a", ""):
        (tmp_path / "api_keys").write_text(f"# first\n{wrong}\n")
        refused = run(stack.docker, *gateway, check=False)
        assert refused.returncode == 2 and digest not in refused.stderr
        with pytest.raises(KeysError) as error:
            ApiKeys(tmp_path / "api_keys")
        assert ("line 2" in refused.stderr) == ("line 2" in str(error.value)) or "\u00e4" in wrong


def test_keys_rotate_without_a_restart(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Under load, an added key works and a removed key stops working within seconds, and no request fails."""
    started = [stack.inspect(each)["State"]["StartedAt"] for each in stack.containers("gateway")]
    path = stack.secrets / "keys" / "api_keys"
    before = path.read_text()
    with stack.under_load() as load:
        second = stack.secret_tool("key", "second")
        until(stack, second, 200)
        replace(path, before)
        until(stack, second, 401)
    faults.append(("API keys changed twice", load))
    assert load.failures == []
    assert [stack.inspect(each)["State"]["StartedAt"] for each in stack.containers("gateway")] == started


def test_reconstructions_of_another_key_are_not_found(stack: Stack) -> None:
    """A second key cannot fetch reconstructions of the first one."""
    path = stack.secrets / "keys" / "api_keys"
    before, (_, _, reply) = path.read_text(), stack.score()
    other = stack.secret_tool("key", "other")
    wait_until(lambda: stack.ask("GET", reply["reconstruction"], key=other)[0] == 404, 10)
    assert stack.ask("GET", reply["reconstruction"])[0] == 200
    replace(path, before)


def test_training_publishes_into_an_empty_volume(stack: Stack, training: subprocess.Popen[str]) -> None:
    """`docker compose run train` on a volume that was never used: the version is there, good, current, not root's."""
    said, _ = training.communicate(timeout=120)
    assert training.returncode == 0 and "published trial@1 (current)" in said
    look = "python -m training verify && stat -c 'owner %u' model_store/trial/1/model.pt model_store/trial/CURRENT"
    seen = stack.compose(*TRAIN, "--entrypoint", "sh", "train", "-c", look).stdout
    assert "trial@1: good" in seen and seen.count("owner 10001") == 2


def test_steady_load(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Without a fault nothing fails and every score has an id."""
    with stack.under_load() as load:
        pass
    faults.append(("none", load))
    assert load.failures == [] and load.without_id == [] and load.sent > 100


def test_a_killed_replica_fails_nobody(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """`kill -9` of a replica under load fails no score: the other replica serves until it has restarted."""
    with stack.under_load(after=1) as load:
        run(stack.docker, "kill", stack.containers("api")[0])
        time.sleep(0.5)
        stack.up("--no-recreate")
    faults.append(("replica killed", load))
    assert load.failures == []
    assert len(stack.containers("api")) == 2


def test_a_hung_replica_fails_nobody(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """A replica that hangs for 5 s fails no score, and no score exceeds the clients' timeout of 10 s."""
    (hung, _) = stack.containers("api")
    with stack.under_load(before=1, after=2) as load:
        # Not `docker pause`: some kernels do not freeze the group of a busy process in time, and the engine gives up.
        run(stack.docker, "kill", "--signal", "STOP", hung)
        time.sleep(5)
        run(stack.docker, "kill", "--signal", "CONT", hung)
    faults.append(("replica hung for 5 s", load))
    assert load.failures == []
    assert 2 < max(load.seconds) < 10


def test_a_version_change_fails_nobody(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Promote and roll back in the mounted volume, under load: both versions answer, no score fails."""

    def promote(version: int) -> None:
        stack.compose("run", "--rm", "-T", "models", "python", "-c", PROMOTE % version)

    for fault, version in (("version 1 to 2", 2), ("version back to 1", 1)):
        with stack.under_load(after=0) as load:
            promote(version)
            wait_until(lambda version=version: all(stack.score()[2]["version"] == version for _ in range(8)), 20)
        faults.append((fault, load))
        assert load.failures == [] and load.versions == {1, 2}


def test_a_redis_restart_fails_nobody(stack: Stack, faults: list[tuple[str, Load]], notes: list[str]) -> None:
    """Redis restarts under load: no score fails, and ids from before are found.

    Ids are null only while it is down, and for about a second until the service probes it again.
    """
    (redis,) = stack.containers("redis")
    with stack.under_load(after=4) as load:
        known = list(load.ids)
        went = time.monotonic()
        stack.compose("restart", "redis")
        wait_until(lambda: "fine" in stack.execute(redis, "sh", "-c", "healthy && echo fine", check=False), 60)
        back = time.monotonic()
    faults.append(("redis restarted", load))
    assert load.failures == []
    nulls = [moment - went for moment in load.without_id]
    if nulls:
        notes.append(
            f"redis was away for {back - went:.1f} s; ids were null from {min(nulls):.1f} s to {max(nulls):.1f} s"
        )
        assert min(nulls) >= 0 and max(nulls) < back - went + 2
    assert stack.score()[2]["id"]
    assert stack.ask("GET", f"/reconstruction/{known[-1]}")[0] == 200


def test_without_redis_scores_go_on(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Without Redis, every score returns a null id; /readyz stays 200 and names the store, without flapping."""
    (first, second) = stack.containers("api")
    with stack.under_load(before=0.5, after=1) as load:
        stack.compose("stop", "redis")
        time.sleep(1.5)
        states = [state for replica in (first, second) for state in stack.readiness(replica, times=6)]
    faults.append(("redis stopped", load))
    assert load.failures == [] and load.without_id
    assert {status for status, _ in states} == {200}
    assert {state["store"] for _, state in states} == {"down"}
    assert stack.score()[2]["id"] is None
    stack.compose("start", "redis")
    for _ in range(40):
        if all(stack.readiness(replica)[0][1]["store"] == "up" for replica in (first, second)):
            break
    assert stack.score()[2]["id"]


def test_scaling_fails_nobody(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Two replicas to three and three to one, under load: no score fails, and the new replica gets its share."""
    with stack.under_load(after=1) as load:
        before = set(stack.containers("api"))
        stack.up("--no-recreate", "--scale", "api=3")
        (new,) = set(stack.containers("api")) - before
    faults.append(("scale 2 to 3", load))
    assert load.failures == []
    assert stack.logs(new).count('"route":"/score"') > 10
    with stack.under_load() as load:
        stack.up("--no-recreate", "--scale", "api=1")
        assert len(stack.containers("api")) == 1
    faults.append(("scale 3 to 1", load))
    assert load.failures == []


def test_ids_survive_a_restart_of_everything(stack: Stack) -> None:
    """After an immediate stop and a new start, the stack still has a reconstruction that is one second old."""
    _, _, reply = stack.score()
    picture = stack.ask("GET", reply["reconstruction"])[2]
    time.sleep(1.2)
    stack.compose("down", "-t", "2")
    stack.up("gateway", "prometheus")
    status, _, body = stack.ask("GET", reply["reconstruction"])
    assert status == 200 and body == picture


def test_alerts_fire_when_they_should(stack: Stack) -> None:
    """Simulated series fire the alerts: probes do not hide errors; a rejected version and a lost gateway alert."""
    folder = ("-v", f"{ROOT}/tests/containers:/tests:ro", "-v", f"{ROOT}/deploy/prometheus:/rules:ro")
    played = ("anomaly-prometheus:dev", "promtool", "test", "rules", "/tests/alerts.yml")
    said = run(stack.docker, "run", "--rm", "--network", "none", *folder, *played)
    assert "SUCCESS" in said.stdout + said.stderr


def test_prometheus_sees_every_replica(stack: Stack) -> None:
    """Prometheus finds both replicas and the gateway, has the series, and every alert rule is healthy."""
    stack.score()
    (prometheus,) = stack.containers("prometheus")

    def query(expression: str) -> list[str]:
        said = stack.execute(prometheus, "promtool", "query", "instant", "http://127.0.0.1:9090", expression)
        return [line for line in said.splitlines() if "=>" in line]

    def wait_for(expression: str, count: int) -> None:
        # Prometheus scrapes every five seconds.
        wait_until(lambda: len(query(expression)) >= count, 40, describe=lambda: f"{count} series of {expression}")

    wait_for('up{job="api"} == 1', 2)
    wait_for('up{job="gateway"} == 1', 1)
    for series in (
        "anomaly_http_requests_total",
        "anomaly_score_stage_duration_seconds_count",
        "anomaly_forward_pass_images_count",
        "anomaly_queue_images",
        "anomaly_problems_total",
        "anomaly_score_mse_count",
        "anomaly_scores_total",
        "anomaly_reconstruction_store_up",
        "anomaly_model_version",
        "anomaly_start_duration_seconds",
        "anomaly_ready",
        "anomaly_event_loop_lag_seconds_count",
        "haproxy_frontend_http_requests_total",
    ):
        wait_for(series, 1)
    rules = json.loads(stack.inside(FETCH, "http://prometheus:9090/api/v1/rules"))["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}


def test_every_series_of_alerts_and_dashboard_exists(stack: Stack) -> None:
    """Each series that an alert rule or a panel names is one of the service's or the gateway's /metrics."""
    known = {"up", "ALERTS"}
    for address in ("http://127.0.0.1:8000/metrics", "http://gateway:8405/metrics"):
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", stack.inside(FETCH, address), re.MULTILINE):
            parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            known |= {name + part for part in parts}
    dashboard = json.loads((ROOT / "deploy/grafana/provisioning/dashboards/anomaly.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert any("ALERTS{" in target["expr"] for panel in panels for target in panel["targets"])
    rules = json.loads(stack.inside(FETCH, "http://prometheus:9090/api/v1/rules"))["data"]["groups"]
    expressions = [rule["query"] for group in rules for rule in group["rules"]]
    assert len(expressions) > 10
    expressions += [target["expr"] for panel in panels for target in panel["targets"]]
    for expression in expressions:
        plain = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|offset) ?(\([^)]*\)|\w+)", " ", expression)
        series = {word for word in re.findall(r"\b[A-Za-z_]\w*\b(?! *\()", plain) if word not in {"or", "and", "by"}}
        assert series and series <= known, expression


def test_a_stop_of_the_gateway_cuts_nothing(stack: Stack) -> None:
    """After a stop signal, the gateway finishes the current batch and then ends at once without an error."""
    body, (gateway,) = array(1_000), stack.containers("gateway")
    connection = stack.connect()
    connection.putrequest("POST", "/score/batch")
    headers = {"x-api-key": stack.key, "content-type": "application/x-npy", "content-length": str(len(body))}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(body[:1000])
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(run, stack.docker, "stop", gateway)
        time.sleep(1.5)
        assert not stopped.done()
        connection.send(body[1000:])
        response = connection.getresponse()
        assert response.status == 200 and json.loads(response.read())["count"] == 1_000
        connection.close()
        stopped.result()
    assert time.monotonic() - began < 10
    assert stack.inspect(gateway)["State"]["ExitCode"] == 0


def test_limits_by_key_refusals_address_and_connections(stack: Stack) -> None:
    """Above the rate limit of a key, of wrong keys or of an address, requests get 429 with Retry-After.

    Connections of one address above their limit are closed. Wrong keys do not lock out a client with the right key.
    """
    limits = {"RATE_PER_KEY": "20", "RATE_REFUSED": "10", "RATE_PER_ADDRESS": "100", "CONNECTIONS_PER_ADDRESS": "20"}
    stack.up("--no-deps", "gateway", **limits)
    time.sleep(1)
    many = []
    for _ in range(30):
        with contextlib.suppress(OSError):
            connection = stack.connect(timeout=5)
            connection.connect()
            many.append(connection)
    assert len(many) == 20
    many[0].request("GET", "/docs")
    assert many[0].getresponse().status == 200
    for connection in many:
        connection.close()
    time.sleep(0.5)
    answers = [stack.ask("GET", "/models", key=f"guess-{number}") for number in range(16)]
    assert refused(answers[0], 401) and refused(answers[-1], 429)["title"] == "Too many rejected keys from this address"
    answers = [stack.ask("GET", "/models") for _ in range(30)]
    assert [answer[0] for answer in answers].count(200) == 20
    assert refused(answers[-1], 429)["title"] == "Too many requests with this key"
    assert answers[-1][1]["retry-after"] == "10"
    answers = [stack.ask("GET", "/docs", key=None) for _ in range(80)]
    assert refused(answers[-1], 429)["title"] == "Too many requests from this address"
    assert refused(answers[-1], 429)["type"] == "/problems/too-many-requests"
    assert answers[-1][1]["retry-after"] == "10"


def test_nothing_secret_was_written(stack: Stack, notes: list[str]) -> None:
    """No log line of any container contains a key, its hash, a password, a path or a stack."""
    logs = stack.written.texts()
    hashes = re.findall(r"[0-9a-f]{64}", (stack.secrets / "keys" / "api_keys").read_text())
    secrets = [stack.key, (stack.secrets / "redis_password").read_text().strip(), *hashes, "/srv/app", "Traceback"]
    starts = Counter(name.partition(".")[0] for name in logs)
    assert starts["gateway"] >= 3 and starts["api"] >= 6 and starts["redis"] >= 4
    assert any('"journey-score"' in text for name, text in logs.items() if name.startswith("api"))
    assert any('"journey-score"' in text for name, text in logs.items() if name.startswith("gateway"))
    for name, text in logs.items():
        assert [secret for secret in secrets if secret in text] == [], name
    lines = sum(text.count("\n") for text in logs.values())
    notes.append(f"log lines searched for secrets: {lines:,}, of {len(logs)} starts of containers")
