"""Run targets with atheris: `python -m tests.fuzz --seconds 60 png npy`. Without names, all targets run in turn.

New inputs are collected in var/fuzz/<target>. An input that violates an assertion is written to var/fuzz/findings; the
exit code is then not 0. `--keep` adds to the corpus in the repository the inputs that reach new code.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tests.campaigns import record

ROOT = Path(__file__).resolve().parent.parent.parent
CORPUS = Path(__file__).parent / "corpus"
NAMES = ("png", "fit", "form", "forms", "npy", "score")
_LONGEST = {"score": 4096, "forms": 4096}
_PROCESS_INPUTS = 150_000
"""Number of inputs per process, because the instrumentation of `fit` keeps 17 KB of memory per input."""


def run(name: str, options: list[str]) -> int:
    """Run one target in this process until its time is over."""
    import atheris

    with atheris.instrument_imports(include=["app", "python_multipart"]):
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    # The seeds are executed once, uninstrumented code included, before the loop begins.
    # To merge, libFuzzer passes its arguments, the first one as the program, to a shell.
    program = shlex.join([sys.executable, "-m", "tests.fuzz", "--one", name])
    atheris.Setup([program, *options], lambda data: target(bytes(data)))
    atheris.Fuzz()
    return 0


def execute(name: str, log: Path, options: list[str]) -> tuple[int, int]:
    """Run a target in a process of its own. Return its exit code and the number of inputs that it executed."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tests.fuzz", "--one", name, *options]
        code = subprocess.run(command, check=False, cwd=ROOT, stdout=output, stderr=output).returncode
    executed = re.findall(r"^stat::number_of_executed_units: *(\d+)", log.read_text(errors="replace"), re.MULTILINE)
    return code, int(executed[-1]) if executed else 0


def main() -> int:
    """Parse the command line, and run each target in a separate process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("names", nargs="*", help=f"Targets: {', '.join(NAMES)}. Default: all.")
    parser.add_argument("--seconds", type=int, default=1800, help="Duration per target. Default: 1800.")
    parser.add_argument("--seed", type=int, default=1, help="Random seed. Default: 1.")
    parser.add_argument("--record", action="store_true", help="Write the result to docs/security.md.")
    parser.add_argument("--keep", action="store_true", help="Add the inputs that reach new code to the corpus.")
    if sys.argv[1:2] == ["--one"]:  # the process of one target, with the options of libFuzzer
        return run(sys.argv[2], sys.argv[3:])
    arguments = parser.parse_args()
    failed = []
    for name in arguments.names or NAMES:
        found, kept = ROOT / "var" / "fuzz" / name, CORPUS / name
        findings = ROOT / "var" / "fuzz" / "findings"
        for folder in (found, findings, kept):
            folder.mkdir(parents=True, exist_ok=True)
        common = [f"-artifact_prefix={findings}/{name}-", f"-max_len={_LONGEST.get(name, 2048)}", "-rss_limit_mb=4096"]
        print(f"== {name}", flush=True)  # noqa: T201
        began, log = time.monotonic(), findings.parent / f"{name}.log"
        if arguments.keep:
            code, _ = execute(name, log, [*common, "-merge=1", str(kept), str(found)])
            print(f"{len(list(kept.iterdir()))} kept inputs; log: {log}", flush=True)  # noqa: T201
        else:
            code = executed = processes = 0
            # A process that fails is the last one, because the next one would overwrite its log.
            while not code and (left := round(began + arguments.seconds - time.monotonic())) > 0:
                options = [f"-max_total_time={left}", f"-runs={_PROCESS_INPUTS}", f"-seed={arguments.seed + processes}"]
                options += ["-timeout=20", "-print_final_stats=1", str(found), str(kept)]
                code, count = execute(name, log, common + options)
                executed += count
                processes += 1
            print(f"{executed} inputs; log: {log}", flush=True)  # noqa: T201
            if arguments.record and executed:
                seconds = time.monotonic() - began
                record(f"`make fuzz`: {name}", f"{executed:,} inputs", seconds, "finding" if code else "none")
        if code:
            failed.append(name)
    print(f"findings in: {', '.join(failed) or 'no target'}")  # noqa: T201
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
