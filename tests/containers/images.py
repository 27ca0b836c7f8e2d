"""Build the images as defined in docker-compose.yml.

`python3 -m tests.containers.images` does it by itself, with the standard library alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CHAINS = (("api", "train"), ("redis", "gateway", "prometheus"))
"""Images of one chain share layers, so they are built one after the other."""


def run(*command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository and return its output."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def build() -> None:
    """Build all images. `docker build` gets the result of `compose config`, as `compose build` needs a plugin."""
    docker = os.environ["DOCKER"]
    # The images contain no secrets, but compose does not read a file whose secrets are missing.
    with tempfile.TemporaryDirectory() as folder:
        run("deploy/secrets", SECRETS=folder)
        said = run(docker, "compose", "--profile", "*", "config", "--format", "json", SECRETS=folder).stdout
    services = json.loads(said)["services"]
    network = ("--network", os.environ["BUILD_NETWORK"]) if "BUILD_NETWORK" in os.environ else ()

    def chain(names: tuple[str, ...]) -> None:
        for name in names:
            how = services[name]["build"]
            options = [f"--build-arg={key}={value}" for key, value in how.get("args", {}).items()]
            options += ["--target", how["target"]] if "target" in how else []
            run(docker, "build", *network, *options, "-t", services[name]["image"], how["context"])

    with ThreadPoolExecutor() as pool:
        list(pool.map(chain, CHAINS))


if __name__ == "__main__":
    build()
