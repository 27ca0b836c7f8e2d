"""Scores the same images by every interface, and compares each interface with the offline command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from anomaly import Client
from anomaly.cli.offline import Offline
from anomaly.cli.scoring import Verdict
from anomaly.cli.sources import Source
from benchmarks.processes import ROOT, Server, service
from tests.infer_requests import binary_request, bytes_tensor, json_request, outputs_of

MODELS = ("zero", "zero-article")
_JSON_IMAGES = 200
"""Images per request with JSON data, which has at most 1 MiB."""
_FILES = 1_000
"""PNGs per request."""


class Scored(NamedTuple):
    """Score and verdict of an image."""

    mse: float
    p_value: float
    is_anomaly: bool


def agreement(folder: Path, images: np.ndarray, model: str) -> dict[str, Any]:
    """Return the largest differences of each interface from the offline command, which scores one image at a time.

    Args:
        folder: for files of this function.
        images: uint8 [N, 28, 28].
        model: its name.
    """
    pngs, npy = folder / "pngs", folder / "agreement.npy"
    pngs.mkdir(parents=True)
    for place, image in enumerate(images):
        Image.fromarray(image).save(pngs / f"{place:05}.png")
    np.save(npy, images)
    paths = sorted(pngs.iterdir())
    os.environ["ANOMALY_DEVICE"] = "cpu"
    found = Offline(ROOT / "model_store", Verdict(model, None, "strict")).results(
        Source(path.name, path) for path in paths
    )
    reference = [_scored(each.outcome) for each in found]
    results: dict[str, list[Scored]] = {}
    server = service(folder)
    try:
        with Client(server.url) as client:
            results["service, single scores"] = [_scored(each) for each in client.score_many(paths, model=model)]
            results["service, batch route"] = [_scored(each) for each in client.score_array(images, model=model)]
        results |= protocol(server, images, paths, model)
    finally:
        server.stop()
    for name, source in (("bulk, PNG folder", pngs), ("bulk, npy", npy)):
        results[name] = bulk(source, folder / name.replace(", ", "-").replace(" ", "-"), model)
    return {
        "images": len(images),
        "anomalous": sum(each.is_anomaly for each in reference),
        "interfaces": {name: difference(reference, values) for name, values in results.items()},
    }


def protocol(server: Server, images: np.ndarray, paths: Sequence[Path], model: str) -> dict[str, list[Scored]]:
    """Score by the Open Inference Protocol, in each form of its requests."""
    url, results = f"/v2/models/{model}/infer", {}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        parts = [images[start : start + _JSON_IMAGES] for start in range(0, len(images), _JSON_IMAGES)]
        results["protocol v2, JSON"] = [
            each for part in parts for each in _outputs(client.post(url, json=json_request(part)))
        ]
        binary = {"parameters": {"binary_data_output": True}}
        body, headers = binary_request(images.tobytes(), list(images.shape), **binary)
        results["protocol v2, binary tensor"] = list(_outputs(client.post(url, content=body, headers=headers)))
        results["protocol v2, binary PNGs"] = []
        for start in range(0, len(paths), _FILES):
            files = [path.read_bytes() for path in paths[start : start + _FILES]]
            body, headers = binary_request(bytes_tensor(files), [len(files)], "BYTES", **binary)
            results["protocol v2, binary PNGs"] += _outputs(client.post(url, content=body, headers=headers))
        results["protocol v1, JSON"] = []
        for part in parts:
            reply = client.post(f"/v1/models/{model}:predict", json={"instances": part.tolist()}).raise_for_status()
            results["protocol v1, JSON"] += [
                Scored(each["mse"], each["p_value"], each["is_anomaly"]) for each in reply.json()["predictions"]
            ]
    return results


def bulk(source: Path, output: Path, model: str) -> list[Scored]:
    """Score by `anomaly bulk`."""
    command = [sys.executable, "-m", "anomaly.cli", "bulk", str(source), str(output), "--model", model, "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = pq.read_table(output).to_pylist()
    rows.sort(key=lambda row: int(row["id"].partition("#")[2] or row["id"].partition(".")[0]))
    return [Scored(row["mse"], row["p_value"], row["verdict"] == "anomalous") for row in rows]


def difference(reference: Sequence[Scored], values: Sequence[Scored]) -> dict[str, float]:
    """Return the largest differences of scores and p-values, and the number of other verdicts."""
    pairs = list(zip(reference, values, strict=True))
    return {
        "mse_relative": max(abs(one.mse - other.mse) / one.mse for one, other in pairs),
        "p_value": max(abs(one.p_value - other.p_value) for one, other in pairs),
        "other_verdicts": sum(one.is_anomaly != other.is_anomaly for one, other in pairs),
    }


def _scored(outcome: Any) -> Scored:
    return Scored(outcome.mse, outcome.p_value, outcome.is_anomaly)


def _outputs(response: httpx.Response) -> Iterator[Scored]:
    outputs = outputs_of(response)
    columns = (outputs[name] for name in ("mse", "p_value", "is_anomaly"))
    return (Scored(float(mse), float(p_value), bool(verdict)) for mse, p_value, verdict in zip(*columns, strict=True))
