"""Find the code of the service and of the training, which the wheel does not contain.

The code belongs to the checkout that this package was imported from. Another package named `app` or `training`, in
the working directory for example, is never imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_PARTS = ("pyproject.toml", "app/__main__.py", "training/__main__.py")


class NotInstalled(Exception):
    """This installation does not contain the code, or lacks a dependency of it."""


def find_checkout() -> Path | None:
    """Return the folder of the checkout that contains this package, or None if the package comes from a wheel."""
    folder = Path(__file__).resolve().parent.parent.parent
    return folder if all((folder / part).is_file() for part in _PARTS) else None


@contextmanager
def service_code(feature: str, image: str | None, extra: str) -> Iterator[None]:
    """Make `app` and `training` of the checkout importable for the block, and for the process after it.

    Args:
        feature: what needs the code, for the message.
        image: container image that offers the same, or None.
        extra: extra of the distribution that contains the dependencies.

    Raises:
        NotInstalled: there is no checkout, or a dependency is missing.
    """
    folder = str(_checkout(feature, image))
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(feature, str(error.name), extra) from error


def run_service(variables: dict[str, str]) -> None:
    """Replace this process by `python -m app`.

    Args:
        variables: environment variables to add.

    Raises:
        NotInstalled: there is no checkout, or a dependency is missing.
    """
    folder = _checkout("`anomaly serve`", "anomaly-api")
    for package in ("fastapi", "torch", "uvicorn"):
        if find_spec(package) is None:
            raise _missing("`anomaly serve`", package, "serve")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    # -P: a folder `app` in the working directory is not the service.
    os.execve(sys.executable, [sys.executable, "-P", "-m", "app"], {**os.environ, **variables, "PYTHONPATH": path})  # noqa: S606


def _checkout(feature: str, image: str | None) -> Path:
    folder = find_checkout()
    if folder is None:
        raise NotInstalled(
            f"{feature} needs the code of the service, which this installation does not contain; "
            "run it in a checkout of the project after `make install`"
            + (f", or use the container image {image}" if image else "")
        )
    return folder


def _missing(feature: str, package: str, extra: str) -> NotInstalled:
    return NotInstalled(
        f"{feature} needs the package {package} of the extra `{extra}`; run `make install` in the checkout"
    )
