"""The commands that run the code of the checkout: `serve`, and those of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anomaly.cli.checkout import run_service, service_code
from anomaly.cli.commands import plain_errors

TRAINING = {
    "train": "Train a model on normal images and publish it as a new version.",
    "all": "Train one model per label, and print the metrics of all.",
    "calibrate": "Choose a new threshold for a model, without training.",
    "publish": "Publish a version from another model store.",
    "sign": "Sign a version with a private key.",
    "list": "List the versions in a model store.",
    "promote": "Make a version the current one.",
    "rollback": "Make an older version the current one.",
    "verify": "Load versions as the service does, and check them.",
}
"""The commands of the training, with their help."""


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on. Default: 8000.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="Number of processes. Default: 1.")] = None,
    model_store: Annotated[
        Path | None, typer.Option(help="Folder of the model versions. Default: model_store.")
    ] = None,
) -> None:
    """Run the service.

    The same as `python -m app`, which has no options. Each option sets its environment variable: ANOMALY_HOST,
    ANOMALY_PORT, ANOMALY_WORKERS, ANOMALY_MODEL_STORE. All other settings come from the environment.

    Example: `anomaly serve --port 8001`
    """
    with plain_errors():
        options = {"HOST": host, "PORT": port, "WORKERS": workers, "MODEL_STORE": model_store}
        variables = {f"ANOMALY_{name}": str(value) for name, value in options.items() if value is not None}
        run_service(variables)


def training(context: typer.Context) -> None:
    """Run the training command with the same name."""
    with plain_errors():
        name = str(context.info_name)
        # The commands import their dependencies when they run.
        with service_code(f"`anomaly {name}`", "anomaly-train", "train"):
            from training.__main__ import app

            app(args=[name, *context.args], prog_name="anomaly")
