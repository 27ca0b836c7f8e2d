"""Measures what an image costs `anomaly bulk` on Ray, with one actor and with two.

`python -m benchmarks.actors` writes benchmarks/results/actors.json. The cost is the processor time of the actors, and
of all processes of a run: driver, actors, tasks that read and write, and Ray itself. A short and a long run are
measured, so that their difference contains no start of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.dataset as ds

from benchmarks.bulk import MODEL, digits, mutated
from benchmarks.processes import ROOT

RESULTS = Path(__file__).parent / "results" / "actors.json"
_STEP = 20_000
"""Images per file."""
_SAMPLE_SECONDS = 0.2


def run(folder: Path, images: np.ndarray, count: int, actors: int) -> dict[str, float]:
    """Score `count` images, and return seconds of wall time, and of processor time of all processes and of actors."""
    source, output = folder / f"in-{count}", folder / f"out-{count}-{actors}"
    if not source.exists():
        source.mkdir()
        for first in range(0, count, _STEP):
            np.save(source / f"{first // _STEP:04}.npy", mutated(images, _STEP, first))
    began = time.perf_counter()
    command = [sys.executable, "-m", "anomaly.cli", "bulk", str(source), str(output), "--model", MODEL, "--quiet"]
    command += ["--address", "local", "--workers", str(actors)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ANOMALY_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    top, used, scoring = psutil.Process(process.pid), {}, set()
    while process.poll() is None:
        try:
            for each in (top, *top.children(recursive=True)):
                times = each.cpu_times()
                used[each.pid] = times.user + times.system
                if "MapWorker" in " ".join(each.cmdline()):  # the title that Ray gives an actor of a pool
                    scoring.add(each.pid)
        except psutil.NoSuchProcess:
            continue  # it has just ended
        time.sleep(_SAMPLE_SECONDS)
    assert process.returncode == 0
    assert ds.dataset(output, format="parquet").count_rows() == count
    assert scoring
    return {
        "images": count,
        "wall_seconds": time.perf_counter() - began,
        "all_seconds": sum(used.values()),
        "actor_seconds": sum(used[each] for each in scoring),
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", type=int, default=40_000, help="Images of the short run.")
    parser.add_argument("--long", type=int, default=400_000, help="Images of the long run.")
    parser.add_argument("--rounds", type=int, default=2, help="Number of rounds.")
    given = parser.parse_args()
    images, source = digits()
    rounds: list[dict[str, Any]] = []
    for number in range(given.rounds):
        found: dict[str, Any] = {}
        for actors in (1, 2) if number % 2 == 0 else (2, 1):
            with tempfile.TemporaryDirectory() as folder:
                short, long = (run(Path(folder), images, count, actors) for count in (given.short, given.long))
            cost = {
                each: 1e6 * (long[f"{each}_seconds"] - short[f"{each}_seconds"]) / (given.long - given.short)
                for each in ("all", "actor")
            }
            found[str(actors)] = {"short": short, "long": long, "us_per_image": cost}
            print(actors, found[str(actors)], flush=True)
        rounds.append(found)
    results = {"digits": source, "model": MODEL, "cores": os.cpu_count(), "rounds": rounds}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
