"""Change the code at random places, and report the changes that no test notices: `python -m tests.mutants keys`.

cosmic-ray makes the changes in a copy of the repository, one at a time, and runs the tests of the module. A mutant is
killed if a test fails or the tests take longer than the time limit. The sample follows from the seed. Survivors are
printed with their difference; docs/security.md lists the reviewed ones.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.campaigns import record
from tests.mutants.forked import ForkedTests

ROOT = Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / ".venv" / "mutants" / "bin" / "cosmic-ray"
MODULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "calibration": (("app/models/calibration.py",), ("tests/app/models/test_calibration.py",)),
    "keys": (("app/http/auth.py",), ("tests/app/http/test_auth.py",)),
    "provenance": (("app/models/provenance.py",), ("tests/app/models/test_provenance.py",)),
    "repository": (("app/models/repository.py",), ("tests/app/models",)),
    "images": (("app/images/png.py", "app/images/chunks.py"), ("tests/app/images/test_png.py", "tests/fuzz")),
    "fit": (("app/images/fit.py", "app/images/digit.py", "app/images/ink.py"), ("tests/app/images",)),
    "batcher": (("app/concurrency/batcher.py",), ("tests/app/concurrency",)),
    "detector": (("app/inference/detector.py",), ("tests/app/inference",)),
}
_EXCLUDED = "ReplaceBinaryOperator_BitOr"
"""Almost each `|` in the code is in an annotation, which is never evaluated."""


def run(name: str, count: int, seed: int, limit: float) -> tuple[int, list[str]]:
    """Test a sample of the mutants of a module.

    Args:
        name: of `MODULES`.
        count: maximum number of mutants.
        seed: of the sample.
        limit: seconds for the tests of one mutant.

    Returns:
        The number of mutants, and a description of each survivor.
    """
    files, tests = MODULES[name]
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copy = Path(temporary) / "tree"
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for path in filter(None, tracked.split("\0")):
            if (ROOT / path).is_file():
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, copy / path)
        arguments = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not process", *tests]
        if subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], cwd=copy, check=False, stdout=subprocess.DEVNULL
        ).returncode:
            sys.exit(f"{name}: the tests fail without any mutant")
        forked = ForkedTests(copy, arguments)
        if forked.serve(shlex.split(forked.command)):
            sys.exit(f"{name}: the tests fail in a forked process without any mutant:\n{forked.log.read_text()}")
        (copy / "mutants.toml").write_text(
            f"[cosmic-ray]\nmodule-path = {json.dumps(list(files))}\ntimeout = {limit}\nexcluded-modules = []\n"
            f"test-command = {json.dumps(forked.command)}\n[cosmic-ray.distributor]\nname = 'local'\n"
        )
        subprocess.run(_cosmic_ray("init"), cwd=copy, check=True)
        _keep_sample(copy / "mutants.sqlite", count, seed)
        if forked.serve(_cosmic_ray("exec")):
            sys.exit(f"{name}: cosmic-ray failed")
        results = _results(copy / "mutants.sqlite")
    return len(results), [difference for outcome, difference in results if outcome == "SURVIVED"]


def _cosmic_ray(command: str) -> list[str]:
    return [str(TOOL), command, "mutants.toml", "mutants.sqlite"]


def _keep_sample(database: Path, count: int, seed: int) -> None:
    with sqlite3.connect(database) as connection:
        # cosmic-ray keeps the paths in a set, whose order differs between two runs.
        query = "SELECT job_id, operator_name FROM mutation_specs ORDER BY module_path, rowid"
        found = connection.execute(query).fetchall()
        eligible = [job for job, operator in found if _EXCLUDED not in operator]
        kept = set(random.Random(seed).sample(eligible, min(count, len(eligible))))
        for table in ("mutation_specs", "work_items"):
            connection.executemany(
                f"DELETE FROM {table} WHERE job_id = ?",
                [(job,) for job, _ in found if job not in kept],
            )


def _results(database: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(database) as connection:
        query = (
            "SELECT r.test_outcome, m.module_path, m.start_pos_row, m.operator_name, r.diff FROM work_results r "
            "JOIN mutation_specs m USING (job_id) ORDER BY m.module_path, m.start_pos_row"
        )
        rows = connection.execute(query).fetchall()
    results = []
    for outcome, path, row, operator, diff in rows:
        changed = [line for line in (diff or "").splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        results.append((str(outcome), f"{path}:{row} {operator}\n" + "\n".join(f"    {line}" for line in changed)))
    return results


def main() -> int:
    """Run the modules in turn, and print the share of killed mutants; exit with 1 if one is below the minimum."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("names", nargs="*", help=f"Modules: {', '.join(MODULES)}. Default: all.")
    parser.add_argument("--count", type=int, default=60, help="Maximum number of mutants per module. Default: 60.")
    parser.add_argument("--seed", type=int, default=1, help="Random seed of the sample. Default: 1.")
    parser.add_argument("--limit", type=float, default=120, help="Seconds for the tests of one mutant. Default: 120.")
    parser.add_argument("--record", action="store_true", help="Write the result to docs/security.md.")
    parser.add_argument("--minimum", type=float, default=90, help="Minimum percentage of killed mutants. Default: 90.")
    arguments = parser.parse_args()
    if not TOOL.exists():
        sys.exit("cosmic-ray is not installed; run `make mutants`")
    below = []
    for name in arguments.names or MODULES:
        began = time.monotonic()
        count, survivors = run(name, arguments.count, arguments.seed, arguments.limit)
        share = 100 * (count - len(survivors)) / count
        sys.stdout.write(f"{name}: {count - len(survivors)} of {count} mutants killed ({share:.0f} %)\n")
        sys.stdout.write("".join(f"  survived: {each}\n" for each in survivors))
        sys.stdout.flush()
        if arguments.record:
            killed_here = f"{count - len(survivors)} killed ({share:.0f} %)"
            amount = f"{count} mutants, seed {arguments.seed}"
            record(f"`make mutants`: {name}", amount, time.monotonic() - began, killed_here)
        if share < arguments.minimum:
            below.append(name)
    sys.stdout.write(f"below {arguments.minimum:g} %: {', '.join(below) or 'none'}\n")
    return bool(below)


if __name__ == "__main__":
    sys.exit(main())
