"""The whole way of a user, with real processes: train, publish, serve, score, look, stop."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.conftest import ROOT, Server


def training(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the training command line as a user does."""
    command = [sys.executable, "-m", "training", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)


@pytest.mark.long
def test_from_training_to_a_picture(
    make_server: Callable[..., Server], tmp_path: Path, zero: bytes, six: bytes
) -> None:
    """A model that was just trained and published is served, scores real digits and shows what it redrew."""
    store = tmp_path / "store"
    for seed in ("1", "2"):
        training(
            *("train", "--recipe", "article", "--normal", "0", "--name", "mine", "--seed", seed, "--alpha", "0.05"),
            *("--epochs", "3", "--model-store", str(store), "--promote"),
        )
    training("rollback", "mine", "--model-store", str(store))
    server = make_server(ANOMALY_MODEL_STORE=str(store), ANOMALY_DEFAULT_MODEL="mine").start()
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/readyz").json()["version"] == 1
        replies = [client.post("/score", files={"file": ("digit.png", png)}).json() for png in (zero, six)]
        assert all(reply["model"] == "mine" and reply["version"] == 1 for reply in replies)
        for reply in replies:
            picture = Image.open(io.BytesIO(client.get(reply["reconstruction"]).content))
            assert picture.size == (28, 28)
            panel = Image.open(io.BytesIO(client.get(reply["reconstruction"] + "?view=panel&scale=8").content))
            assert panel.size == (736, 304)
        training("promote", "mine", "2", "--model-store", str(store))
        until = time.monotonic() + 30
        while client.get("/readyz").json()["version"] != 2:
            assert time.monotonic() < until, server.log()
            time.sleep(0.1)
        again = client.post("/score", content=zero, headers={"content-type": "image/png"}).json()
        assert again["version"] == 2
        assert again["mse"] != replies[0]["mse"]
        assert client.get("/models/mine").json()["recipe"]["seed"] == 2
        assert client.get(replies[0]["reconstruction"]).status_code == 200
    assert server.stop() in (0, -15)
