"""Record what the service with the shipped models returns, as examples for the OpenAPI document."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from PIL import Image

from app.http.examples import FILE
from app.main import create_app
from app.settings import Settings
from benchmarks.processes import ROOT
from tests.conftest import lifespan

EXAMPLES = ROOT / "examples"
_KEPT = 4
"""Number of members of a long object, items of a long array, or lines of a long text, that an example shows."""


async def record(folder: Path) -> dict[str, Any]:
    """Return the replies by operation, status and media type."""
    found: dict[str, Any] = {}
    images = np.stack([np.asarray(Image.open(EXAMPLES / name)) for name in ("zero.png", "six.png")])

    async def ask(client: httpx.AsyncClient, operation: str, path: str, accept: str = "", **body: Any) -> Any:
        headers = {**({"accept": accept} if accept else {}), **body.pop("headers", {})}
        reply = await client.request("POST" if body else "GET", path, headers=headers, **body)
        media_type = reply.headers["content-type"].partition(";")[0]
        is_json = media_type == "application/json"
        example = shortened(reply.json()) if is_json else beginning(reply.text)
        found.setdefault(operation, {}).setdefault(str(reply.status_code), {})[media_type] = example
        return reply.json() if is_json else None

    common = {"log_requests": False, "device": "cpu"}
    settings = Settings(store_url=f"sqlite:///{folder}/reconstructions.db", **common)
    app = create_app(settings)
    async with lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        png = {"content": (EXAMPLES / "six.png").read_bytes(), "headers": {"content-type": "image/png"}}
        npy = io.BytesIO()
        np.save(npy, images)
        batch = {"content": npy.getvalue(), "headers": {"content-type": "application/x-npy"}}
        score = await ask(client, "score", "/score", **png)
        await ask(client, "score_batch", "/score/batch?fdr=0.05", **batch)
        await ask(client, "score_batch", "/score/batch", "application/x-ndjson", **batch)
        await ask(client, "reconstruction", score["reconstruction"], "application/json")
        for operation, path in (
            ("models", "/models"),
            ("model", "/models/zero"),
            ("model_version", "/models/zero/versions/1"),
            ("calibration", "/models/zero/versions/1/calibration"),
            ("validity", "/models/zero/validity"),
            ("report", "/models/zero/versions/1/report/evaluation.json"),
            ("report", "/models/zero/versions/1/report/model-card.md"),
            ("livez", "/livez"),
            ("readyz", "/readyz"),
            ("metrics", "/metrics"),
            ("v2_live", "/v2/health/live"),
            ("v2_ready", "/v2/health/ready"),
            ("v2_server", "/v2"),
            ("v2_model", "/v2/models/zero"),
            ("v2_model_version", "/v2/models/zero/versions/1"),
            ("v2_config", "/v2/models/zero/config"),
            ("v2_version_config", "/v2/models/zero/versions/1/config"),
            ("v2_model_ready", "/v2/models/zero/ready"),
            ("v2_version_ready", "/v2/models/zero/versions/1/ready"),
            ("v1_models", "/v1/models"),
            ("v1_model_ready", "/v1/models/zero"),
        ):
            await ask(client, operation, path)
        await ask(client, "metrics", "/metrics", "application/openmetrics-text")
        tensor = {"name": "images", "shape": list(images.shape), "datatype": "UINT8", "data": images.ravel().tolist()}
        for operation, path in (("v2_infer", "zero"), ("v2_version_infer", "zero/versions/1")):
            await ask(client, operation, f"/v2/models/{path}/infer", json={"id": "1", "inputs": [tensor]})
        await ask(client, "v1_predict", "/v1/models/zero:predict", json={"instances": images.tolist()})
    (folder / "empty").mkdir()
    app = create_app(Settings(store_url=f"sqlite:///{folder}/other.db", model_store=folder / "empty", **common))
    async with lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        await ask(client, "readyz", "/readyz")
        await ask(client, "v2_ready", "/v2/health/ready")
    return found


def beginning(text: str) -> str:
    """Return the first lines of a text, and the mark of the end of OpenMetrics."""
    lines = text.splitlines(keepends=True)
    return "".join(lines[:_KEPT] + [line for line in lines[_KEPT:] if line == "# EOF\n"])


def shortened(document: Any, depth: int = 0) -> Any:
    """Return a document without most members of its long inner objects and most items of its long arrays."""
    if isinstance(document, list):
        return [shortened(each, depth + 1) for each in (document if len(document) < 2 * _KEPT else document[:_KEPT])]
    if isinstance(document, dict):
        names = list(document) if depth == 0 or len(document) < 4 * _KEPT else list(document)[:_KEPT]
        return {name: shortened(document[name], depth + 1) for name in names}
    return document


def main() -> None:
    """Record, and write the file."""
    with TemporaryDirectory() as folder:
        found = asyncio.run(record(Path(folder)))
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
