"""Measure the service next to what it is compared with: `python -m benchmarks`, or `make bench`.

Within a section every system is measured in turn, round after round, so that other programs affect all systems equally;
figures are medians of the rounds. Writes one JSON file, from which `benchmarks.write_performance` writes the page.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import psutil

from app.models.repository import Repository
from benchmarks.processes import ROOT, Server, peer, service
from benchmarks.without import TRICKS
from tests.pngs import chunk, plain

RESULTS = ROOT / "benchmarks" / "results" / "latest.json"
IMAGES = 64
Cell = dict[str, Any]


def digits(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return real digits where DATA_DIR names a folder of MNIST, blurred blobs elsewhere; uint8 [count, 28, 28]."""
    folder = os.environ.get("DATA_DIR")
    for path in sorted(Path(folder).glob("t10k-images*")) if folder else []:
        if path.suffix in (".gz", "") or path.name.endswith("ubyte"):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            images = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
            return images[np.arange(count) % len(images)]
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:28, :28]
    centres, widths = rng.uniform(8, 20, (1000, 2, 1, 1)), rng.uniform(2, 6, (1000, 1, 1))
    blobs = 255 * np.exp(-((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2) / widths**2)
    return blobs.astype(np.uint8)[np.arange(count) % 1000]


def wrk(server: Server, bodies: Path, *, form: str, path: str, connections: int, seconds: float) -> Cell:
    """Run one closed loop and return rates, percentiles and CPU microseconds per request."""
    environment = {**os.environ, "BODIES": str(bodies), "COUNT": str(IMAGES), "TARGET": path, "FORM": form}
    before = server.cpu_seconds()
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}", "--timeout", "30"]
    command += ["-s", str(ROOT / "benchmarks" / "post.lua"), server.url]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.rpartition("RESULT ")[2])
    cpu = server.cpu_seconds() - before
    return {
        "rate": found["requests"] / found["seconds"],
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
        "failed": found["failed"],
        "cpu_us": 1e6 * cpu / max(1, found["requests"]),
    }


def medians(cells: list[Cell]) -> Cell:
    """Return the median of every member over the rounds, and the sum of failures."""
    middle = {name: statistics.median(cell[name] for cell in cells) for name in cells[0]}
    return {**middle, **({"failed": sum(cell["failed"] for cell in cells)} if "failed" in middle else {})}


def interleaved(cells: dict[str, Callable[[], Cell]], rounds: int) -> dict[str, Cell]:
    """Measure every cell once per round, and return medians."""
    found: dict[str, list[Cell]] = {name: [] for name in cells}
    for number in range(rounds):
        for name, measure in cells.items():
            found[name].append(measure())
            shown = {key: round(value, 2) for key, value in found[name][-1].items() if isinstance(value, float)}
            print(f"  round {number + 1} {name}: {shown}", flush=True)
    return {
        name: {**medians(measured), "rates": [_rate(cell) for cell in measured]} for name, measured in found.items()
    }


def _rate(cell: Cell) -> float:
    return float(cell["rate"] if "rate" in cell else cell["images_per_second"])


def model_file(model: str) -> Path:
    """Return the TorchScript file of a model's current version."""
    store = ROOT / "model_store"
    return store / model / str(Repository(store).current(model)) / "model.pt"


def ceiling(model: str, seconds: float, *sizes: int) -> dict[str, Cell]:
    """Run the raw module alone, and return its rates by batch size."""
    command = [sys.executable, "-m", "benchmarks.ceiling", str(model_file(model)), str(seconds), *map(str, sizes)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Cell] = json.loads(run.stdout)
    return found


def only(model: str, folder: Path) -> dict[str, str]:
    """Return the settings of a service with a single model, for the lowest memory."""
    store = folder / f"only-{model}"
    if not store.exists():
        shutil.copytree(ROOT / "model_store" / model, store / model, symlinks=True)
    return {"ANOMALY_MODEL_STORE": str(store), "ANOMALY_DEFAULT_MODEL": model}


def single(model: str, chosen: argparse.Namespace, folder: Path, bodies: Path) -> Cell:
    """Single scores at every concurrency, against floors and the tutorial's server."""
    servers = [
        service(folder, f"service-{model}", **only(model, folder)),
        peer("bare", folder),
        peer("fastapi_raw", folder),
        peer("fastapi_upload", folder),
        peer("naive", folder, BENCH_ARTIFACT=str(model_file(model))),
    ]
    ours, bare, fastapi_raw, fastapi_upload, naive = servers
    systems = {
        "service, raw": (ours, "raw", "/score"),
        "service, multipart": (ours, "multipart", "/score"),
        "bare ASGI, raw": (bare, "raw", "/score"),
        "FastAPI constant, raw": (fastapi_raw, "raw", "/score"),
        "FastAPI empty UploadFile": (fastapi_upload, "multipart", "/score"),
        "tutorial server, async": (naive, "multipart", "/score"),
    }
    try:
        for server, form, target in systems.values():
            wrk(server, bodies, form=form, path=target, connections=64, seconds=1)
        found: Cell = {"start_seconds": {server.name: server.start_seconds for server in servers}, "connections": {}}
        for connections in chosen.connections:
            print(f"{model}, {connections} connections", flush=True)
            cells = {
                name: functools.partial(
                    wrk, server, bodies, form=form, path=target, connections=connections, seconds=chosen.seconds
                )
                for name, (server, form, target) in systems.items()
            }
            found["connections"][str(connections)] = interleaved(cells, chosen.rounds)
        found["memory_mb"] = {server.name: server.memory_mb() for server in servers}
        found["stages_ms"] = stages(ours, bodies)
        return found
    finally:
        for server in servers:
            server.stop()


def stages(server: Server, bodies: Path) -> Cell:
    """Return the time of each stage, from Server-Timing: medians of 2,000 sequential requests on one connection."""
    pngs = [file.read_bytes() for file in sorted(bodies.glob("*.png"))]
    cells: list[Cell] = []
    with httpx.Client(base_url=server.url) as client:
        for number in range(2000):
            reply = client.post("/score", content=pngs[number % len(pngs)], headers={"content-type": "image/png"})
            timing = reply.headers["server-timing"].split(", ")
            cells.append({name: float(duration) for name, _, duration in (part.partition(";dur=") for part in timing)})
    return medians(cells)


def post_array(server: Server, body: bytes, count: int, accept: str, model: str, *, times: int = 1) -> Cell:
    """Send one array `times` times, and return images per second and CPU microseconds per image."""
    headers = {"content-type": "application/x-npy", "accept": accept}
    with httpx.Client(timeout=300) as client:  # making one reads certificates: as long as scoring a thousand images
        before, began = server.cpu_seconds(), time.perf_counter()
        for _ in range(times):
            client.post(f"{server.url}/score/batch?model={model}", content=body, headers=headers).raise_for_status()
        seconds = time.perf_counter() - began
    images = times * count
    return {"images_per_second": images / seconds, "cpu_us": 1e6 * (server.cpu_seconds() - before) / images}


def npy(count: int) -> bytes:
    """Return `count` digits as an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, digits(count))
    return buffer.getvalue()


def batch(model: str, chosen: argparse.Namespace, folder: Path, _: Path) -> Cell:
    """Measure requests of 10,000 images, compared with the raw module in a loop."""
    server = service(folder, f"batch-{model}")
    body = npy(chosen.images)
    sizes: list[dict[str, Cell]] = []

    def raw() -> Cell:
        sizes.append(ceiling(model, chosen.seconds / 8))
        return max(sizes[-1].values(), key=lambda cell: float(cell["images_per_second"]))

    def ours(accept: str) -> Cell:
        cells = [post_array(server, body, chosen.images, accept, model) for _ in range(3)]
        return max(cells, key=lambda cell: float(cell["images_per_second"]))

    try:
        post_array(server, body, chosen.images, "application/x-npy", model)
        print(f"{model}, batches", flush=True)
        cells: dict[str, Callable[[], Cell]] = {
            "raw TorchScript, best batch size": raw,
            "npy": lambda: ours("application/x-npy"),
            "NDJSON": lambda: ours("application/x-ndjson"),
            "JSON": lambda: ours("application/json"),
        }
        found = interleaved(cells, chosen.rounds)
        by_size = {size: medians([each[size] for each in sizes]) for size in sizes[0]}
        return {"images": chosen.images, "replies": found, "ceiling_by_batch_size": by_size}
    finally:
        server.stop()


def fairness(model: str, chosen: argparse.Namespace, folder: Path, bodies: Path) -> Cell:
    """Latency of single scores on four connections, alone and while two clients send batches without pause."""
    server = service(folder, f"fair-{model}")
    body = folder / "batch.npy"
    body.write_bytes(npy(10_000))
    script = (
        "import sys,httpx,pathlib\nb=open(sys.argv[2],'rb').read()\nstop=pathlib.Path(sys.argv[3])\n"
        "while not stop.exists():\n httpx.post(sys.argv[1],content=b,headers={'content-type':'application/x-npy',"
        "'accept':'application/x-npy'},timeout=300)\n print(flush=True)"
    )
    url = f"{server.url}/score/batch?model={model}"

    def measure() -> Cell:
        return wrk(server, bodies, form="raw", path=f"/score?model={model}", connections=4, seconds=chosen.seconds)

    def loaded() -> Cell:
        stop = folder / "stop"
        command = [sys.executable, "-c", script, url, str(body), str(stop)]
        clients = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        try:
            for client in clients:  # each has had a reply and is at its next request
                assert client.stdout is not None and client.stdout.readline()
            return measure()
        finally:
            stop.touch()  # and not killed: of what a client had sent the service would score a part in the next cell
            for client in clients:
                client.communicate()
            stop.unlink()

    try:
        measure()
        print(f"{model}, fairness", flush=True)
        return interleaved({"alone": measure, "with two batch clients": loaded}, chosen.rounds)
    finally:
        server.stop()


def open_loop(model: str, chosen: argparse.Namespace, folder: Path, bodies: Path) -> Cell:
    """Measure fixed rates: half and twice the maximum rate of the closed loop, then a tenth, to observe the recovery.

    For each rate, the result is the round with the median p99. A bare ASGI server is measured at half the maximum rate
    as well, to show the latency of the load generator itself.
    """
    server, bare = service(folder, f"open-{model}", **only(model, folder)), peer("bare", folder)

    def drive(server: Server, rate: float, connections: int, seconds: float) -> Cell:
        command = [sys.executable, "-m", "benchmarks.open_loop", str(server.port), str(bodies), str(rate)]
        command += [str(seconds), "--connections", str(connections)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        cell: Cell = json.loads(run.stdout)
        print(f"  {server.name} {cell}", flush=True)
        return cell

    try:
        print(f"{model}, open loop", flush=True)
        ask = functools.partial(wrk, server, bodies, form="raw", path="/score", connections=64)
        ask(seconds=1)
        rounds: dict[str, list[Cell]] = {"half": [], "bare": [], "twice": [], "after": []}
        reached: list[float] = []
        for _ in range(chosen.rounds):
            # Of this round: with a busy neighbour, half of an earlier round's most may be nearly all of this one's.
            most = ask(seconds=chosen.seconds)["rate"]
            reached.append(most)
            rounds["half"].append(drive(server, most / 2, 256, chosen.seconds))
            rounds["bare"].append(drive(bare, most / 2, 256, chosen.seconds))
            rounds["twice"].append(drive(server, 2 * most, 4000, chosen.seconds))
            time.sleep(1)  # the next rate measures whether the service recovers within a second
            rounds["after"].append(drive(server, most / 10, 256, 2))
        middle = {
            name: sorted(cells, key=lambda cell: cell["p99_ms"] or math.inf)[len(cells) // 2]
            for name, cells in rounds.items()
        }
        return {"most": statistics.median(reached), **middle}
    finally:
        server.stop()
        bare.stop()


def workers(model: str, chosen: argparse.Namespace, folder: Path, bodies: Path) -> Cell:
    """One worker and two."""
    servers = {n: service(folder, f"workers-{n}", ANOMALY_WORKERS=str(n), **only(model, folder)) for n in (1, 2)}
    try:
        print(f"{model}, workers", flush=True)
        cells = {
            f"{n} worker{'s' * (n > 1)}": lambda server=server: wrk(
                server, bodies, form="raw", path="/score", connections=64, seconds=chosen.seconds
            )
            for n, server in servers.items()
        }
        found = interleaved(cells, chosen.rounds)
        for (name, cell), server in zip(found.items(), servers.values(), strict=True):
            found[name] = {**cell, "rss_mb": server.memory_mb()[0], "pss_mb": server.memory_mb()[1]}
        return found
    finally:
        for server in servers.values():
            server.stop()


def tricks(model: str, chosen: argparse.Namespace, folder: Path, bodies: Path) -> Cell:
    """Compare the service without each optimisation with the complete service. Both begin with an empty store."""
    found: Cell = {}
    print(f"{model}, tricks", flush=True)
    for name in TRICKS:
        whole = service(folder, f"beside-{name}", ANOMALY_DEFAULT_MODEL=model)
        server = service(folder, f"without-{name}", command=["benchmarks.without", name], ANOMALY_DEFAULT_MODEL=model)
        ask = _ask_for(name, model, bodies, chosen.seconds / 2)
        try:
            ask(server)
            ask(whole)
            cells = {"without": functools.partial(ask, server), "with": functools.partial(ask, whole)}
            found[name] = interleaved(cells, chosen.rounds)
            # A service that is broken without the optimisation returns errors, and quickly.
            if any(cell.get("failed") for cell in found[name].values()):
                raise RuntimeError(f"requests failed without {name}, or with it")
        finally:
            server.stop()
            whole.stop()
    return {"tricks": found}


def _ask_for(trick: str, model: str, bodies: Path, seconds: float) -> Callable[[Server], Cell]:
    """Return a function that measures a server with the requests that an optimisation is for."""
    if trick != "passes":
        form = {"form": "multipart", "joined": "get"}.get(trick, "raw")
        connections = {"chain": 16, "freeze": 900}.get(trick, 64)
        path = "/models" if form == "get" else "/score"
        return functools.partial(wrk, bodies=bodies, form=form, path=path, connections=connections, seconds=seconds)
    body = npy(10_000)

    def batches(server: Server) -> Cell:
        cell = post_array(server, body, 10_000, "application/x-npy", model, times=3)
        return {"rate": cell["images_per_second"], "cpu_us": cell["cpu_us"]}

    return batches


def growth(model: str, chosen: argparse.Namespace, folder: Path, bodies: Path) -> Cell:
    """Measure how the cost depends on images per request and on entries in the store."""
    found: Cell = {"images": {}, "bodies": {}, "models": {}, "store": {}}
    server = service(folder, f"growth-{model}")
    try:
        print(f"{model}, growth", flush=True)
        for count in (1, 10, 100, 1000, 10_000, 100_000):
            body = npy(count)
            # CPU time comes in hundredths of a second: small requests are sent often enough to fill some.
            times = max(1, 1000 // count)
            cells = [post_array(server, body, count, "application/x-npy", model, times=times) for _ in range(3)]
            found["images"][str(count)] = {**medians(cells), "rss_mb": server.memory_mb()[0]}
            print(f"  {count} images: {found['images'][str(count)]}", flush=True)
        for kilobytes in (0, 4, 16, 60):
            # The same digits after a text chunk, which the decoder checks and ignores.
            padded = folder / f"bodies-{kilobytes}"
            padded.mkdir()
            for number, image in enumerate(digits(IMAGES)):
                extra = [chunk(b"tEXt", bytes(1024 * kilobytes))] if kilobytes else []
                (padded / f"{number}.png").write_bytes(plain(image, *extra))
            cell = wrk(server, padded, form="raw", path=f"/score?model={model}", connections=64, seconds=chosen.seconds)
            found["bodies"][str(kilobytes)] = cell
            print(f"  bodies of {kilobytes} KiB more: {cell}", flush=True)
    finally:
        server.stop()
    for count in (1, 5, 20):
        store = folder / f"models-{count}"
        for number in range(count):
            shutil.copytree(ROOT / "model_store" / model, store / f"{model}-{number}", symlinks=True)
            _rename(store / f"{model}-{number}")
        server = service(folder, f"models-{count}", ANOMALY_MODEL_STORE=str(store), ANOMALY_DEFAULT_MODEL=f"{model}-0")
        try:
            cell = wrk(server, bodies, form="raw", path="/score", connections=64, seconds=chosen.seconds)
            found["models"][str(count)] = {
                **cell, "start_seconds": server.start_seconds, "rss_mb": server.memory_mb()[0]
            }  # fmt: skip
            print(f"  {count} models: {found['models'][str(count)]}", flush=True)
        finally:
            server.stop()
    for entries in (1_000, 10_000, 100_000, 1_000_000) if chosen.large else (1_000, 10_000, 100_000):
        name = f"store-{entries}"
        bound = {"ANOMALY_STORE_MAX_BYTES": str(4_000_000_000), "ANOMALY_STORE_TTL_SECONDS": "86400"}
        server = service(folder, name, **bound)
        try:
            _fill(server, entries, model)
            cell = wrk(server, bodies, form="raw", path=f"/score?model={model}", connections=64, seconds=chosen.seconds)
            found["store"][str(entries)] = {**cell, "file_mb": (folder / f"{name}.db").stat().st_size / 1e6}
            print(f"  {entries} entries: {found['store'][str(entries)]}", flush=True)
        finally:
            server.stop()
            for file in folder.glob(f"{name}.db*"):
                file.unlink()
    return found


def _rename(folder: Path) -> None:
    """Make a copy of a model's folder the model of its own name."""
    for path in folder.glob("*/manifest.json"):
        document = json.loads(path.read_text())
        document["name"] = folder.name
        path.write_text(json.dumps(document))


def _fill(server: Server, entries: int, model: str) -> None:
    body, headers = npy(1000), {"content-type": "application/x-npy"}
    with httpx.Client(timeout=300) as client:
        for _ in range(entries // 1000):
            url = f"{server.url}/score/batch?model={model}&store=true"
            client.post(url, content=body, headers=headers).raise_for_status()


def soak(model: str, chosen: argparse.Namespace, folder: Path, bodies: Path) -> Cell:
    """Memory over many requests."""
    server = service(folder, f"soak-{model}", **only(model, folder))
    found: Cell = {"requests": 0, "rss_mb": {}}
    try:
        print(f"{model}, soak", flush=True)
        while found["requests"] < chosen.soak:
            found["rss_mb"][str(found["requests"])] = server.memory_mb()[0]
            cell = wrk(server, bodies, form="raw", path="/score", connections=64, seconds=10)
            found["requests"] += round(10 * cell["rate"])
            print(f"  {found['requests']} requests, {server.memory_mb()[0]:.0f} MB", flush=True)
        found["rss_mb"][str(found["requests"])] = server.memory_mb()[0]
        return found
    finally:
        server.stop()


SECTIONS = {
    "single": single,
    "batch": batch,
    "fairness": fairness,
    "open_loop": open_loop,
    "workers": workers,
    "tricks": tricks,
    "growth": growth,
    "soak": soak,
}


def machine(device: str) -> Cell:
    """Return a general description of the machine."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    import torch

    return {
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None,
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version() + (" (the system's)" if sys.base_prefix == "/usr" else ""),
        "torch": torch.__version__,
    }


def commit() -> str:
    """Say which commit is measured, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # the files were fetched without their history
        return "unknown"


def main() -> None:
    """Measure the chosen sections and write the file."""
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("--models", nargs="+", default=["zero-article", "zero"])
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=[name for name in SECTIONS if name != "soak"]
    )
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=4, help="of each cell")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="in one batch request")
    parser.add_argument("--soak", type=int, default=1_000_000, help="requests of the soak")
    parser.add_argument("--large", action="store_true", help="with a store of a million entries")
    parser.add_argument("--device", default="cpu", help="of the service: cpu, cuda or cuda:n")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    os.environ["BENCH_DEVICE"] = chosen.device
    # Read the commit before writing, because the results file is in the repository and changes its state.
    code = commit()
    there = Repository(ROOT / "model_store").names()
    result: Cell = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    with TemporaryDirectory() as place:
        folder, bodies = Path(place), Path(place) / "bodies"
        bodies.mkdir()
        for number, image in enumerate(digits(IMAGES)):
            (bodies / f"{number}.png").write_bytes(plain(image))
        for model in chosen.models:
            if model not in there:
                print(f"skipped {model}: the model store does not have it", flush=True)
                continue
            for section in chosen.sections:
                alone = ceiling(model, 1, 1)["1"]["images_per_second"]
                found = SECTIONS[section](model, chosen, folder, bodies)
                found |= {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": code}
                found |= {"forward_us": 1e6 / alone, "rounds": chosen.rounds, "seconds": chosen.seconds}
                result.setdefault(model, {})[section] = found
                result["machine"] = machine(chosen.device)
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
