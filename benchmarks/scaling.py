"""Measures what one image costs each part of a deployment: service, Redis, gateway, network, bulk scoring.

`python -m benchmarks.scaling` writes benchmarks/results/scaling.json. Costs are processor time, because it does not
depend on other programs of the machine as the rate does. `python -m benchmarks.write_scaling` writes the documents.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
from PIL import Image

from benchmarks.__main__ import IMAGES, wrk
from benchmarks.bulk import MODEL, digits, mutated
from benchmarks.processes import Server, free_port, service
from tests.waiting import wait_until

RESULTS = Path(__file__).parent / "results" / "scaling.json"
CONNECTIONS = 16
SECONDS = 4.0
ROUNDS = 3


@contextmanager
def redis_server(folder: Path, max_bytes: int = 0) -> Iterator[tuple[str, Any]]:
    """Run redis-server with the settings of deploy/redis, and yield its URL and a client."""
    port = free_port()
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes",
               "maxmemory": max_bytes, "maxmemory-policy": "volatile-ttl"}  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)
    try:
        wait_until(lambda: _answers(client))
        yield f"redis://127.0.0.1:{port}/0", client
    finally:
        client.close()
        process.terminate()
        process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _accepts(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def gateway(folder: Path, servers: list[Server]) -> Iterator[Server]:
    """Run HAProxy with one thread in front of servers, without TLS and keys, and yield it."""
    port = free_port()
    lines = ["global", " nbthread 1", "defaults", " mode http", " timeout connect 5s", " timeout client 60s",
             " timeout server 60s", " http-reuse always", f"listen all\n bind 127.0.0.1:{port}"]  # fmt: skip
    lines += [f" server s{number} 127.0.0.1:{server.port}" for number, server in enumerate(servers)]
    path = folder / "haproxy.cfg"
    path.write_text("\n".join(lines) + "\n")
    process = subprocess.Popen(["haproxy", "-f", str(path), "-db"], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: _accepts(port))
        yield Server("gateway", port, process, 0.0)
    finally:
        process.terminate()
        process.wait()


def together(work: list[Callable[[], dict[str, float]]]) -> list[dict[str, float]]:
    """Run all at the same time, and return what each returned."""
    found: list[dict[str, float]] = []
    threads = [threading.Thread(target=lambda each=each: found.append(each())) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def redis_use(client: Any) -> dict[str, float]:
    """Return the totals of a Redis server."""
    info = client.info()
    return {
        "cpu": info["used_cpu_user"] + info["used_cpu_sys"],
        "in": info["total_net_input_bytes"],
        "out": info["total_net_output_bytes"],
        "keys": info["db0"]["keys"] if "db0" in info else 0,
        "bytes": info["used_memory"],
    }


def online(folder: Path, bodies: Path) -> dict[str, Any]:
    """Measure single scores with one replica, two replicas, two workers, and a gateway, all with one Redis server."""
    target = f"/score?model={MODEL}"

    def load(server: Server, connections: int = CONNECTIONS) -> dict[str, float]:
        return wrk(server, bodies, form="raw", path=target, connections=connections, seconds=SECONDS)

    names = ("one", "two", "workers", "redis", "in", "out", "entry", "gateway")
    cells: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        url, client = stack.enter_context(redis_server(folder))
        replicas = [service(folder, f"replica{number}", ANOMALY_STORE_URL=url) for number in range(2)]
        workers = service(folder, "workers", ANOMALY_STORE_URL=url, ANOMALY_WORKERS="2")
        for server in (*replicas, workers):
            stack.callback(server.stop)
        front = stack.enter_context(gateway(folder, replicas[:1]))
        for server in (*replicas, workers):
            load(server)
        for _ in range(ROUNDS):
            before = redis_use(client)
            cells["one"].append(load(replicas[0])["cpu_us"])
            after = redis_use(client)
            stored = after["keys"] - before["keys"]
            cells["redis"].append(1e6 * (after["cpu"] - before["cpu"]) / stored)
            for name in ("in", "out"):
                cells[name].append((after[name] - before[name]) / stored)
            cells["entry"].append((after["bytes"] - before["bytes"]) / stored)
            both = together([functools.partial(load, replica) for replica in replicas])
            cells["two"].append(statistics.fmean(each["cpu_us"] for each in both))
            cells["workers"].append(load(workers, 2 * CONNECTIONS)["cpu_us"])
            cells["gateway"].append(load(front)["cpu_us"])
            client.flushall()
    return {name: {"median": statistics.median(values), "rounds": values} for name, values in cells.items()}


def bound(folder: Path, bodies: Path) -> dict[str, Any]:
    """Fill a Redis server of 16 MB, and return its use at the bound and what the service reported."""
    limit = 16 * 1024 * 1024
    with redis_server(folder, limit) as (url, client):
        server = service(folder, "bounded", ANOMALY_STORE_URL=url)
        try:
            while client.info()["evicted_keys"] < 2000:
                found = wrk(server, bodies, form="raw", path=f"/score?model={MODEL}", connections=16, seconds=2)
            info = client.info()
            return {
                "limit": limit, "used": info["used_memory"], "keys": info["db0"]["keys"],
                "evicted": info["evicted_keys"], "failed_scores": found["failed"],
            }  # fmt: skip
        finally:
            server.stop()


def batch(folder: Path, images: np.ndarray) -> dict[str, Any]:
    """Measure the batch route with npy bodies of 2,048 images."""
    from anomaly import Client

    server = service(folder, "batch")
    try:
        with Client(server.url) as client:
            client.score_array(images, model=MODEL)
            cells = []
            for _ in range(ROUNDS):
                before = server.cpu_seconds()
                client.score_array(images, model=MODEL)
                cells.append(1e6 * (server.cpu_seconds() - before) / len(images))
        return {"median": statistics.median(cells), "rounds": cells}
    finally:
        server.stop()


def main() -> None:
    """Measure, and write the results."""
    images, source = digits()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bodies = folder / "bodies"
        bodies.mkdir()
        for number, image in enumerate(mutated(images, IMAGES)):
            Image.fromarray(image).save(bodies / f"{number}.png")
        results = {
            "digits": source, "model": MODEL, "cores": os.cpu_count(), "connections": CONNECTIONS,
            "request_bytes": statistics.fmean(path.stat().st_size for path in bodies.iterdir()),
            "online": online(folder, bodies), "bound": bound(folder, bodies),
            "batch": batch(folder, mutated(images, 20_480)),
        }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
