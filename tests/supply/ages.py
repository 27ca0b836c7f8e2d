"""Find bounds that keep a package at a release older than a year: `python -m tests.supply.ages`.

A pin is too old if its release is older than a year and a newer stable release exists. The index that pip is configured
for gives the dates (PEP 700).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from packaging.version import InvalidVersion, Version
from pip._internal.models.index import PyPI

ROOT = Path(__file__).resolve().parent.parent.parent
_YEAR = timedelta(days=365)


def judge(name: str, pinned: str, released: Mapping[Version, datetime], now: datetime) -> str | None:
    """Return why a pin is too old, or None.

    Args:
        name: name of the package.
        pinned: its version in constraints.txt.
        released: date of each release on the package index.
        now: current time.
    """
    version = Version(pinned)
    if version not in released:
        return f"{name} {pinned}: the index does not know this release"
    newest = max((each for each in released if not each.is_prerelease), default=version)
    if newest <= version or now - released[version] <= _YEAR:
        return None
    return f"{name} {pinned} is of {released[version]:%Y-%m-%d}; the newest release is {newest}"


def bounded() -> dict[str, str]:
    """Return the pins of the packages that pyproject.toml bounds, by name."""
    names = re.findall(r'"([A-Za-z0-9-]+)(?:\[[a-z,]+\])?>=', (ROOT / "pyproject.toml").read_text())
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    normal = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    return {name: normal[name.lower()] for name in sorted(set(names)) if name.lower() in normal}


def releases(index: str, name: str) -> dict[Version, datetime]:
    """Return the date of the first file of each release."""
    request = urllib.request.Request(
        f"{index.rstrip('/')}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        files = json.load(reply)["files"]
    found: dict[Version, datetime] = {}
    for file in files:
        match = re.match(r"[A-Za-z0-9_.-]+?-(\d[^-]*?)(?:-.*\.whl|\.tar\.gz|\.zip)$", file["filename"])
        if match and "upload-time" in file and not file.get("yanked"):
            try:
                version = Version(match[1])
            except InvalidVersion:
                continue
            date = datetime.fromisoformat(file["upload-time"])
            found[version] = min(date, found.get(version, date))
    return found


def main() -> int:
    """Check every bounded package, and print the pins that are too old."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], check=False, capture_output=True, text=True
    )
    index = asked.stdout.strip() or PyPI.simple_url
    now, pins, reasons = datetime.now(UTC), bounded(), []
    for name, pinned in pins.items():
        try:
            reason = judge(name, pinned, releases(index, name), now)
        except (OSError, ValueError, KeyError) as error:
            reason = f"{name}: the index gives no dates ({error})"
        if reason:
            reasons.append(reason)
    sys.stdout.write("".join(f"{reason}\n" for reason in reasons) or f"{len(pins)} pins, none too old\n")
    return bool(reasons)


if __name__ == "__main__":
    sys.exit(main())
