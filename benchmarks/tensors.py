"""Compares tensor requests of the Open Inference Protocol with the raw module, and writes docs/inference-protocol.md.

`python -m benchmarks.tensors` scores the same 10,000 images in turn: by one request with a binary tensor, and by the
TorchScript module in this process, on one thread, with the pixels in memory and with its best batch size. Other
programs of the machine slow both down, so only the ratios of the rounds count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from app.inference.detector import torchscript_allowed
from benchmarks.__main__ import digits, model_file
from benchmarks.processes import ROOT, service
from tests.infer_requests import binary_request, outputs_of

RESULTS = Path(__file__).parent / "results" / "tensors.json"
PAGE = ROOT / "docs" / "inference-protocol.md"
BEGIN, END = "<!-- rate of tensors -->\n", "<!-- /rate of tensors -->"
IMAGES = 10_000
SIZES = (32, 64, 128, 256, 512)
MODELS = ("zero", "zero-article")


def raw_module(model: str, images: np.ndarray) -> Callable[[], None]:
    """Return a function that scores all images with the module alone, with the batch size that is fastest here."""
    torch.set_num_threads(1)
    with torchscript_allowed():
        module: Any = torch.jit.freeze(torch.jit.load(model_file(model)).eval())
    pixels = torch.from_numpy(images.reshape(-1, 1, 28, 28))

    def score(size: int) -> None:
        with torch.inference_mode():
            for start in range(0, len(pixels), size):
                module(pixels[start : start + size])

    best = min(SIZES, key=lambda size: min(seconds(lambda: score(size)) for _ in range(4)))
    return lambda: score(best)


def seconds(work: Callable[[], None]) -> float:
    """Return the seconds that a function takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(folder: Path, model: str, rounds: int) -> dict[str, list[float]]:
    """Return the images per second of both, round by round."""
    images = digits(IMAGES)
    raw = raw_module(model, images)
    body, headers = binary_request(images.tobytes(), list(images.shape), parameters={"binary_data_output": True})
    server = service(folder, model)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:

            def request() -> None:
                response = client.post(f"/v2/models/{model}/infer", content=body, headers=headers)
                assert len(outputs_of(response)["mse"]) == IMAGES

            both = {"raw": raw, "tensor": request}
            found: dict[str, list[float]] = {name: [] for name in both}
            for number in range(rounds + 2):
                for name in ("raw", "tensor") if number % 2 else ("tensor", "raw"):
                    rate = IMAGES / seconds(both[name])
                    if number >= 2:  # the first rounds warm up
                        found[name].append(rate)
            return found
    finally:
        server.stop()


def paragraph(found: dict[str, dict[str, list[float]]]) -> str:
    """Return the paragraph of the page."""
    ratios = {
        model: sorted(a / b for a, b in zip(rates["tensor"], rates["raw"], strict=True))
        for model, rates in found.items()
    }
    parts = [
        f"{statistics.median(each):.2f} (quartiles {each[len(each) // 4]:.2f} and {each[3 * len(each) // 4]:.2f}) for "
        f"`{model}`"
        for model, each in ratios.items()
    ]
    rounds = len(next(iter(ratios.values())))
    text = (
        f"The rate of a request with a binary tensor of {IMAGES:,} images, divided by the rate of the raw TorchScript "
        f"module on one thread, is {' and '.join(parts)}. These are medians of {rounds} rounds, in which both score "
        "the same images in turn."
    )
    return textwrap.fill(text, 120) + "\n"


def main() -> None:
    """Measure, and write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41, help="Number of rounds.")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        found = {model: compare(Path(folder), model, rounds) for model in MODELS}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    text = paragraph(found)
    print(text)
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
