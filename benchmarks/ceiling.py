"""The raw module in a loop on one thread: images per second by batch size, the ceiling of every batch request.

Run as a process of its own: `python -m benchmarks.ceiling model.pt seconds [batch size ...]`. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from app.inference.detector import torchscript_allowed

SIZES = (1, 8, 16, 32, 64, 128, 256, 1024)


def main(path: str, seconds: float, sizes: Sequence[int]) -> None:
    """Print CPU microseconds an image and images a second for each batch size."""
    torch.set_num_threads(1)
    with torchscript_allowed():
        module = torch.jit.freeze(torch.jit.load(path).eval())
    rng = np.random.default_rng(0)
    found = {}
    with torch.inference_mode():
        for size in sizes:
            images = torch.from_numpy(rng.integers(0, 256, (size, 1, 28, 28), np.uint8))
            for _ in range(3):
                module(images)
            count, began, cpu = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - began < seconds:
                module(images)
                count += size
            found[size] = {
                "cpu_us": 1e6 * (time.process_time() - cpu) / count,
                "images_per_second": count / (time.perf_counter() - began),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), [int(size) for size in sys.argv[3:]] or SIZES)
