"""Measure what one image costs in the shipped detectors: `python -m benchmarks.detector_cost`.

One thread, frozen TorchScript as in the service, real digits. The models are called in turn, so that other load affects
all equally. CPU time, not wall time. Writes benchmarks/results/detector-cost.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

from app.inference.detector import Detector
from app.models.repository import Repository

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "detector-cost.json"
BATCHES = {1: 400, 32: 150, 256: 20}


def main() -> None:
    """Measure every current model of the store, print and write the figures."""
    torch.set_num_threads(1)
    repository = Repository(ROOT / "model_store")
    names = sorted(path.parent.name for path in (ROOT / "model_store").glob("*/CURRENT"))
    artifacts = {name: repository.open(name, repository.current(name) or 0) for name in names}
    detectors = {name: Detector.load(artifact, torch.device("cpu")) for name, artifact in artifacts.items()}
    digits = np.concatenate([artifact.golden.images for artifact in artifacts.values()])
    times: dict[str, dict[str, list[float]]] = {name: {str(batch): [] for batch in BATCHES} for name in names}
    for batch, repeats in BATCHES.items():
        images = np.ascontiguousarray(np.resize(digits, (batch, 1, 28, 28)))
        for repeat in range(repeats + 10):
            for name, detector in detectors.items():
                begun = time.process_time()
                detector.detect(images)
                if repeat >= 10:
                    times[name][str(batch)].append((time.process_time() - begun) / batch * 1e6)
    found = {
        name: {
            "version": artifacts[name].manifest.version,
            "recipe": artifacts[name].manifest.recipe.name,
            "model_bytes": len(artifacts[name].model),
            "microseconds": {
                batch: {
                    "least": round(min(taken), 1),
                    "median": round(float(np.median(taken)), 1),
                    "repeats": len(taken),
                }
                for batch, taken in per_batch.items()
            },
        }
        for name, per_batch in times.items()
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
