"""Check that the software bill of materials lists what is installed: `python -m tests.supply.sbom var/sbom.json`."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path


def missing(document: dict[str, object], installed: set[tuple[str, str]]) -> list[str]:
    """Return each installed package, as `name==version`, that a CycloneDX document does not list.

    Args:
        document: the bill of materials.
        installed: names and versions.
    """
    components = document.get("components")
    assert isinstance(components, list)
    listed = {(_key(each["name"]), each.get("version")) for each in components}
    return sorted(f"{name}=={version}" for name, version in installed if (_key(name), version) not in listed)


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Compare a file with the environment of this interpreter; exit with 1 if a package is missing."""
    document = json.loads(Path(sys.argv[1]).read_text())
    own = document["metadata"]["component"]["name"]
    found = {(each.metadata["Name"], each.version) for each in importlib.metadata.distributions()}
    installed = {(name, version) for name, version in found if _key(name) != _key(own)}
    lacking = missing(document, installed)
    sys.stdout.write(f"{len(installed) - len(lacking)} packages listed, missing: {', '.join(lacking) or 'none'}\n")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
