"""Look up the pinned packages in the advisory database: `python -m tests.supply.audit`.

pip-audit skips a package that it cannot look up, and ends with exit code 0. Here, each skipped package is a failure:
an audit that did not take place must not look like one without findings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / ".venv" / "supply" / "bin" / "pip-audit"


def judge(report: dict[str, list[dict[str, object]]], expected: int) -> list[str]:
    """Return the reasons why an audit is not passed.

    Args:
        report: JSON document of pip-audit.
        expected: number of packages that were to be looked up.
    """
    packages = report["dependencies"]
    reasons = [
        f"{package['name']} {package['version']}: {finding['id']}, fixed in {', '.join(finding['fix_versions'])}"
        for package in packages
        for finding in package.get("vulns", [])  # type: ignore[attr-defined]
    ]
    looked_up = sum("skip_reason" not in package for package in packages)
    if looked_up < expected:
        reasons.append(
            f"{expected - looked_up} of {expected} packages were not looked up: the advisory database cannot be "
            "reached or does not know them; run the audit on a machine with access to it"
        )
    return reasons


def main() -> int:
    """Audit constraints.txt, and print the findings."""
    pins = (ROOT / "constraints.txt").read_text().split()
    command = [str(TOOL), "--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--format", "json"]
    result = subprocess.run(
        [*command, "--progress-spinner", "off"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    try:
        report = json.loads(result.stdout)
    except ValueError:
        sys.stderr.write(f"{result.stderr}not audited: pip-audit failed\n")
        return 1
    reasons = judge(report, len(pins))
    sys.stdout.write(
        "".join(f"{reason}\n" for reason in reasons) or f"{len(pins)} packages without known vulnerability\n"
    )
    return bool(reasons)


if __name__ == "__main__":
    sys.exit(main())
