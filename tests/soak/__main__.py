"""Run a soak: `make soak`, or `python -m tests.soak --seconds 1800 --seed 7`."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.campaigns import record
from tests.soak.load import soak


def main() -> int:
    """Run a soak, and print its report as JSON; exit with 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Mixed load with faults at random.")
    parser.add_argument("--seconds", type=float, default=1800, help="Duration. Default: 1800.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="Random seed.")
    parser.add_argument("--record", action="store_true", help="Write the result to docs/security.md.")
    given = parser.parse_args()
    sys.stdout.write(f"seed {given.seed}\n")
    sys.stdout.flush()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), given.seconds, given.seed)
    sys.stdout.write(f"{json.dumps(report, indent=1)}\n")
    if given.record:
        faults = sum(count for name, count in report["counts"].items() if name.startswith("fault: "))
        amount = f"{report['counts']['scored']:,} scores, {faults:,} faults, seed {given.seed}"
        slope = f"memory {report['memory_mb_per_10_minutes']:+.2f} MB per 10 minutes"
        record("`make soak`", amount, time.monotonic() - began, f"{'; '.join(report['wrong']) or 'none'}, {slope}")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
