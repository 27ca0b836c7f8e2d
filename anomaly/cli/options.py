"""The options that several commands share."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from anomaly import Fit
from anomaly.cli.formats import Format
from anomaly.client.environment import DEFAULT_URL, KEY_FILE, URL

Url = Annotated[str, typer.Option(envvar=URL, help="Address of the service, with its path prefix if it has one.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(envvar=KEY_FILE, help="File with the API key. ANOMALY_KEY may contain the key itself."),
]
ModelStore = Annotated[
    Path | None, typer.Option(help="Model store for offline scoring. Default: score with the service.")
]
Model = Annotated[str | None, typer.Option(help="`name` or `name@version`. Default: the default model.")]
Alpha = Annotated[
    float | None, typer.Option(help="False-positive rate of the verdicts, 0.001 for example. Default: the model's own.")
]
Fitting = Annotated[
    Fit | None,
    typer.Option(
        help="`mnist` accepts any size: it crops, scales and centres the strokes as MNIST does. `resize` prepares "
        "images as those of the training. Default: what the model was trained with."
    ),
]
FalseDiscoveryRate = Annotated[
    float | None,
    typer.Option(
        "--fdr",
        help="Also mark the anomalies of all images together at this false-discovery rate, 0.05 for example: at most "
        "this share of them is expected to be normal.",
    ),
]
Output = Annotated[Format, typer.Option("--format", "-f", help="Format of the results.")]
Concurrency = Annotated[int, typer.Option(min=1, max=64, help="Maximum number of concurrent requests.")]
Patience = Annotated[
    float, typer.Option(min=0, help="Seconds for which a request is retried while the service is busy or restarts.")
]

__all__ = [
    "DEFAULT_URL", "Alpha", "Concurrency", "FalseDiscoveryRate", "Fitting", "KeyFile", "Model", "ModelStore", "Output",
    "Patience", "Url", "existing_folder",
]  # fmt: skip


def existing_folder(text: str) -> Path:
    """Return the path of a folder, or raise `BadParameter`."""
    with suppress(OSError):
        if text and Path(text).is_dir():
            return Path(text)
    raise typer.BadParameter(f"there is no folder {text!r}")
