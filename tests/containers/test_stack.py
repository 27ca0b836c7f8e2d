"""The shipped stack, for real: images, hardening, refusals, and what it withstands under load. Order matters."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import EXAMPLES, ROOT
from tests.containers.stack import PNG_, Load, Stack, run

pytestmark = pytest.mark.containers
IMAGES = ("api", "gateway", "redis", "prometheus")
PROFILES = ((), ("train",), ("observability",), ("gpu",), ("train", "observability", "gpu"))
PROMOTE = """
import json, pathlib, shutil
model = pathlib.Path("/models/zero-article")
if not (model / "2").exists():
    shutil.copytree(model / "1", model / ".staging-2")
    manifest = json.loads((model / ".staging-2/manifest.json").read_text())
    (model / ".staging-2/manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    (model / ".staging-2").rename(model / "2")
(model / ".CURRENT").write_text("%d\\n")
(model / ".CURRENT").rename(model / "CURRENT")
"""


def test_dockerfiles_are_clean(stack: Stack) -> None:
    """hadolint has nothing to say of any Dockerfile."""
    files = [str(path) for path in (ROOT / "Dockerfile", *ROOT.glob("deploy/*/Dockerfile"))]
    assert len(files) == 4
    assert run(os.environ["HADOLINT"], *files).stdout == ""


@pytest.mark.parametrize("profiles", PROFILES, ids="+".join)
def test_compose_file_is_valid(stack: Stack, profiles: tuple[str, ...]) -> None:
    """Compose accepts the file with every profile; what it does not check itself, sources and targets, exists."""
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
    for secret in config["secrets"].values():
        assert Path(secret["file"]).is_file()


def test_up_without_secrets_says_what_to_do(stack: Stack) -> None:
    """Without secrets, compose refuses in one line that names the command which makes them."""
    refused = run(stack.docker, "compose", "--env-file", "/dev/null", "up", "-d", "--no-build", check=False, SECRETS="")
    assert refused.returncode != 0
    assert "make secrets" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_image_is_small_and_holds_only_the_service(stack: Stack) -> None:
    """The CPU image stays below 1.2 GB and has no pip, no compiler, no training code, no tests and no secrets."""
    size = stack.inspect("anomaly-api:dev")["Size"] / 1e9
    print(f"image size: {size:.2f} GB")  # noqa: T201
    assert size < 1.2
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


def test_one_port_is_open(stack: Stack) -> None:
    """The engine forwards one port of the host; it is the gateway's."""
    published = {
        (service, binding["HostPort"])
        for service in ("gateway", "api", "redis")
        for container in stack.containers(service)
        for bindings in stack.inspect(container)["NetworkSettings"]["Ports"].values()
        for binding in bindings or []
    }
    assert published == {("gateway", str(stack.port))}
    ours = stack.inspect(stack.containers("gateway")[0])["Name"]
    proxies = {
        connection.laddr.port
        for connection in psutil.net_connections("tcp")
        if connection.status == "LISTEN" and connection.pid and psutil.Process(connection.pid).name() == "docker-proxy"
    }
    if "BUILD_NETWORK" in os.environ:  # an engine of our own: whatever it forwards is ours
        assert proxies == {stack.port}, ours


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
    """The gateway does not speak TLS 1.1, and no plain HTTP."""
    old = ("--tls-max", "1.1", "--ciphers", "ALL:@SECLEVEL=0", f"https://localhost:{stack.port}/docs")
    assert run("curl", "-sSk", *old, check=False).returncode == 35
    with socket.create_connection(("localhost", stack.port), 5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        plain.settimeout(10)
        assert not plain.recv(64).startswith(b"HTTP")


def refused(answer: tuple[int, dict[str, str], bytes], status: int) -> dict[str, Any]:
    """Check that an answer is a problem of a status, and return it."""
    assert answer[0] == status, answer
    assert answer[1]["content-type"] == "application/problem+json"
    assert "server" not in answer[1]
    problem: dict[str, Any] = json.loads(answer[2])
    assert problem["status"] == status and problem["type"].startswith("/problems/")
    return problem


def test_refusals(stack: Stack) -> None:
    """No key, wrong key, inside routes, too much, wrong kind: each is a problem with its status."""
    zero = (EXAMPLES / "zero.png").read_bytes()
    for key in (None, "wrong", sha256(stack.key.encode()).hexdigest()):
        answer = stack.ask("POST", "/score", zero, key=key, **PNG_)
        assert refused(answer, 401)["type"] == "/problems/unauthorized"
        assert answer[1]["www-authenticate"].startswith("ApiKey")
    for path in ("/metrics", "/livez", "/readyz"):
        refused(stack.ask("GET", path), 404)
    assert refused(stack.ask("POST", "/score", b"x" * 65537, **PNG_), 413)["type"] == "/problems/body-too-large"
    refused(stack.ask("POST", "/score", io.BytesIO(b"x" * 90000), **PNG_), 413)
    refused(stack.ask("POST", "/score/batch", b"", content_length=str(64 << 20), **PNG_), 413)
    refused(stack.ask("POST", "/score", zero, content_type="application/x-pickle"), 415)
    refused(stack.ask("POST", "/score", b"GIF89a", **PNG_), 422)
    refused(stack.ask("POST", "/score", b"", **PNG_), 400)
    refused(stack.ask("GET", "/nowhere"), 404)


def test_a_key_in_the_gateway_is_a_key_in_the_service(stack: Stack) -> None:
    """Whoever is inside the network and goes round the gateway still needs a key."""
    program = (
        "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000); c.request('GET', '/models');"
        "print(c.getresponse().status)"
    )
    assert stack.execute(stack.containers("api")[0], "python", "-c", program).strip() == "401"


def test_slow_clients_are_let_go(stack: Stack) -> None:
    """A client that drips its headers or its body is answered 408 or cut off within ten seconds."""
    head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {stack.key}\r\nContent-Type: image/png\r\n"
    for opening in (head, head + "Content-Length: 400\r\n\r\n"):
        connection = stack.connect()
        connection.connect()
        began = time.monotonic()
        connection.sock.sendall(opening.encode())
        connection.sock.settimeout(0.5)
        answer = None
        while answer is None and time.monotonic() - began < 12:
            try:
                connection.sock.sendall(b"x")
                answer = connection.sock.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                answer = b""
        assert time.monotonic() - began < 10
        assert answer is not None and (answer == b"" or b" 408 " in answer.partition(b"\r\n")[0])
        connection.close()


def test_keys_rotate_without_a_restart(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """A key added under load works within seconds, taken out it stops working, and no request fails meanwhile."""

    def until(key: str, wanted: int) -> None:
        for _ in range(40):
            if stack.ask("GET", "/models", key=key)[0] == wanted:
                return
            time.sleep(0.25)
        raise AssertionError(f"no {wanted} within ten seconds")

    started = [stack.inspect(each)["State"]["StartedAt"] for each in stack.containers("gateway")]
    path = stack.secrets / "keys" / "api_keys"
    before = path.read_text()
    with stack.under_load() as load:
        second = stack.secret_tool("key", "second")
        until(second, 200)
        (path.parent / "new").write_text(before)
        (path.parent / "new").replace(path)
        until(second, 401)
    faults.append(("API keys changed twice", load))
    assert load.failures == []
    assert [stack.inspect(each)["State"]["StartedAt"] for each in stack.containers("gateway")] == started


def test_reconstructions_of_another_key_are_not_found(stack: Stack) -> None:
    """A second key does not find what the first one scored."""
    path = stack.secrets / "keys" / "api_keys"
    before, (_, _, reply) = path.read_text(), stack.score()
    other = stack.secret_tool("key", "other")
    for _ in range(40):
        status, _, _ = stack.ask("GET", reply["reconstruction"], key=other)
        if status == 404:
            break
        time.sleep(0.25)
    assert status == 404
    assert stack.ask("GET", reply["reconstruction"])[0] == 200
    path.chmod(0o644)
    path.write_text(before)


def test_steady_load(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Without a fault nothing fails and every score has an id."""
    with stack.under_load() as load:
        time.sleep(2)
    faults.append(("none", load))
    assert load.failures == [] and load.without_id == 0 and load.sent > 100


def test_a_killed_replica_fails_nobody(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """`kill -9` of a replica under load fails no score: the other one answers in its place."""
    with stack.under_load(after=4) as load:
        run(stack.docker, "kill", stack.containers("api")[0])
    faults.append(("replica killed", load))
    assert load.failures == []
    stack.up("--no-recreate")
    assert len(stack.containers("api")) == 2


def test_scaling_fails_nobody(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Two replicas to three and three to one, under load: no score fails, and the new replica gets its share."""
    with stack.under_load(after=4) as load:
        before = set(stack.containers("api"))
        stack.up("--no-recreate", "--scale", "api=3")
        (new,) = set(stack.containers("api")) - before
    faults.append(("scale 2 to 3", load))
    assert load.failures == []
    assert stack.logs(new).count('"route":"/score"') > 10
    with stack.under_load() as load:
        stack.up("--no-recreate", "--scale", "api=1")
    faults.append(("scale 3 to 1", load))
    assert load.failures == []
    assert len(stack.containers("api")) == 1
    stack.up("--no-recreate")


def test_a_version_change_fails_nobody(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Promote and roll back in the mounted volume, under load: both versions answer, no score fails."""

    def promote(version: int) -> None:
        volume = ("-v", "anomaly-test_models:/models", "--network", "none")
        run(stack.docker, "run", "--rm", *volume, "anomaly-api:dev", "python", "-c", PROMOTE % version)

    with stack.under_load(after=5) as load:
        promote(2)
    faults.append(("version 1 to 2", load))
    assert load.failures == [] and load.versions == {1, 2}
    with stack.under_load(after=5) as load:
        promote(1)
    faults.append(("version back to 1", load))
    assert load.failures == [] and load.versions == {1, 2}
    assert stack.score()[2]["version"] == 1


def test_a_redis_restart_fails_nobody(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Redis restarts under load: no score fails, a bounded number has no id, and ids from before are found."""
    with stack.under_load(after=4) as load:
        known = list(load.ids)
        stack.compose("restart", "redis")
    faults.append(("redis restarted", load))
    assert load.failures == []
    assert load.without_id < load.sent / 2
    assert stack.score()[2]["id"]
    assert stack.ask("GET", f"/reconstruction/{known[-1]}")[0] == 200


def test_without_redis_scores_go_on(stack: Stack, faults: list[tuple[str, Load]]) -> None:
    """Redis stopped: every score is answered, with a null id; readiness stays 200 and says so, without flapping."""
    (first, second) = stack.containers("api")
    with stack.under_load(before=0.5, after=1) as load:
        stack.compose("stop", "redis")
        time.sleep(1.5)
        states = [stack.readiness(replica) for _ in range(6) for replica in (first, second)]
    faults.append(("redis stopped", load))
    assert load.failures == [] and load.without_id > 0
    assert {status for status, _ in states} == {200}
    assert {state["store"] for _, state in states} == {"down"}
    assert stack.score()[2]["id"] is None
    stack.compose("start", "redis")
    for _ in range(40):
        if all(stack.readiness(replica)[1]["store"] == "up" for replica in (first, second)):
            break
        time.sleep(0.25)
    assert stack.score()[2]["id"]


def test_ids_survive_a_restart_of_everything(stack: Stack) -> None:
    """`compose down` and `up` keep what was answered a second before: Redis' log is on a volume."""
    _, _, reply = stack.score()
    picture = stack.ask("GET", reply["reconstruction"])[2]
    time.sleep(1.2)
    stack.compose("down", "-t", "10")
    stack.up()
    status, _, body = stack.ask("GET", reply["reconstruction"])
    assert status == 200 and body == picture


def test_prometheus_sees_every_replica(stack: Stack) -> None:
    """Prometheus finds both replicas and the gateway, has the series, and every alert rule is healthy."""
    stack.score()
    stack.up("prometheus")
    (prometheus,) = stack.containers("prometheus")

    def query(expression: str) -> list[str]:
        said = stack.execute(prometheus, "promtool", "query", "instant", "http://127.0.0.1:9090", expression)
        return [line for line in said.splitlines() if "=>" in line]

    for _ in range(60):
        if len(query('up{job="api"} == 1')) == 2 and len(query('up{job="gateway"} == 1')) == 1:
            break
        time.sleep(0.5)
    assert len(query('up{job="api"} == 1')) == 2
    for series in (
        "http_requests_total", "score_stage_seconds_count", "batch_images_count", "queue_images", "score_shed_total",
        "score_mse_count", "score_verdicts_total", "store_up", "model_version", "start_seconds", "ready",
        "event_loop_lag_seconds_count", "haproxy_frontend_http_requests_total",
    ):  # fmt: skip
        assert query(series), series
    rules = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    for name in set(re.findall(r"\b([a-z_]+)(?=\{|\[|\))", rules)) & {"score_shed_total", "store_up", "ready"}:
        assert query(name), name


def test_limits_by_key_and_by_refusals(stack: Stack) -> None:
    """Above the rate of a key, and above the rate of wrong keys from an address, the answer is 429 with Retry-After."""
    stack.up("--no-deps", "gateway", RATE_PER_KEY="20", RATE_REFUSED="10")
    for _ in range(40):
        if stack.ask("GET", "/docs", key=None)[0] == 200:
            break
        time.sleep(0.25)
    answers = [stack.ask("GET", "/models") for _ in range(30)]
    assert [answer[0] for answer in answers].count(200) == 20
    assert refused(answers[-1], 429)["type"] == "/problems/too-many-requests"
    assert answers[-1][1]["retry-after"] == "10"
    answers = [stack.ask("GET", "/models", key=f"guess-{number}") for number in range(16)]
    assert refused(answers[0], 401) and refused(answers[-1], 429)


def test_nothing_secret_was_written(stack: Stack) -> None:
    """After all of the above no log line of any container holds a key, its hash, a password, a path or a stack."""
    hashes = [line.split()[0] for line in (stack.secrets / "keys" / "api_keys").read_text().splitlines()]
    secrets = [stack.key, (stack.secrets / "redis_password").read_text().strip(), *hashes, "/srv/app", "Traceback"]
    for service in ("gateway", "api", "redis"):
        for container in stack.containers(service):
            log = stack.logs(container)
            assert log
            assert [secret for secret in secrets if secret in log] == []
