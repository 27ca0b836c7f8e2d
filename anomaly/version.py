"""Find the version of this package."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

DISTRIBUTION = "reconstruction-anomaly"


def version() -> str:
    """Return the version of the installed distribution, or that of the checkout if none is installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        import tomllib

        project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
        return str(project["version"])
