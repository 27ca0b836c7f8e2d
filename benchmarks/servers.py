"""The servers for comparison: minimal servers that return a constant, and the server of a typical tutorial.

Each is a factory for uvicorn: `uvicorn --factory benchmarks.servers:bare`.
"""

from __future__ import annotations

import gc
import io
import os
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

CONSTANT = b'{"padding":"%s"}' % (b"x" * 270)
"""As many bytes as a score's reply."""

App = Callable[..., Awaitable[None]]


def bare() -> App:
    """Read the body and return a constant, without a framework, to measure uvicorn itself."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(CONSTANT))]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": CONSTANT})

    return app


def fastapi_raw() -> Any:
    """Read the raw body in a FastAPI route and return a constant."""
    from fastapi import FastAPI, Request, Response

    app = FastAPI()

    async def score(request: Request) -> Response:
        await request.body()
        return Response(CONSTANT, media_type="application/json")

    score.__annotations__ = {"request": Request, "return": Response}
    app.post("/score")(score)
    _freeze()
    return app


def fastapi_upload() -> Any:
    """Take an `UploadFile` in a FastAPI route without reading it, and return a constant."""
    from fastapi import FastAPI, Response, UploadFile

    app = FastAPI()

    async def score(file: UploadFile) -> Response:
        assert file.filename
        return Response(CONSTANT, media_type="application/json")

    score.__annotations__ = {"file": UploadFile, "return": Response}
    app.post("/score")(score)
    _freeze()
    return app


def naive() -> Any:
    """Reply like the tutorial's server, with the same settings: async, one thread, the same frozen module."""
    import numpy as np
    import torch
    from fastapi import FastAPI, UploadFile
    from PIL import Image

    from app.inference.detector import torchscript_allowed

    torch.set_num_threads(1)
    with torchscript_allowed():
        model = torch.jit.freeze(torch.jit.load(os.environ["BENCH_ARTIFACT"]).eval())
    kept: dict[str, bytes] = {}
    app = FastAPI()

    async def score(file: UploadFile) -> dict[str, Any]:
        picture = Image.open(io.BytesIO(await file.read())).convert("L")
        with torch.inference_mode():
            mse, reconstruction, _, _ = model(torch.from_numpy(np.array(picture))[None, None])
        key = uuid.uuid4().hex
        # Raw pixels instead of a PNG, which is expensive to encode.
        kept[key] = (reconstruction * 255).to(torch.uint8).numpy().tobytes()
        if len(kept) > 50_000:
            kept.clear()
        value = float(mse[0])
        return {"id": key, "mse": value, "is_anomaly": value > 0.02, "reconstruction": f"/reconstruction/{key}"}

    score.__annotations__ = {"file": UploadFile, "return": dict[str, Any]}
    app.post("/score")(score)
    for _ in range(3):
        model(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    _freeze()
    return app


def _freeze() -> None:
    gc.collect()
    gc.freeze()
