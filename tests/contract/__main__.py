"""Start a service with API keys, and run schemathesis against it: `python -m tests.contract --examples 200`.

Options after `--` are those of `st run`. The exit code is that of schemathesis, or 1 if the service logged an error.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.campaigns import record
from tests.conftest import ROOT, Server

TOOL = ROOT / ".venv" / "contract" / "bin" / "st"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,missing_required_header,unsupported_method,"
    "allow_header_conformance,use_after_free,ensure_resource_availability,ignored_auth"
)


def main() -> int:
    """Run schemathesis once with a valid API key: stateful, and with invalid keys where it checks authentication."""
    parser = argparse.ArgumentParser(prog="python -m tests.contract")
    parser.add_argument("--examples", type=int, default=2000, help="Examples per operation. Default: 2000.")
    parser.add_argument("--seed", type=int, default=1, help="Random seed. Default: 1.")
    parser.add_argument("--record", action="store_true", help="Write the result to docs/security.md.")
    parser.add_argument("options", nargs="*", help="Further options of `st run`.")
    arguments = parser.parse_args()
    if not TOOL.exists():
        sys.exit("schemathesis is not installed; run `make contract`")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        key = secrets.token_hex(32)
        (folder / "keys").write_text(f"{hashlib.sha256(key.encode()).hexdigest()} contract\n")
        # The scheduler of a busy machine is not a fault of the store.
        settings = {"LOG_LEVEL": "error", "DEADLINE_MS": "10000", "STORE_TIMEOUT_MS": "5000"}
        settings["API_KEYS_FILE"] = str(folder / "keys")
        server = Server(folder, **{f"ANOMALY_{name}": value for name, value in settings.items()})
        server.start()
        try:
            command = [str(TOOL), "run", f"{server.url}/openapi.json", "--header", f"X-API-Key: {key}"]
            command += ["--checks", CHECKS, "--seed", str(arguments.seed), "--max-examples", str(arguments.examples)]
            command += ["--continue-on-failure", "--generation-database", "none", *arguments.options]
            environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.contract.hooks", "PYTHONPATH": str(ROOT)}
            began = time.monotonic()
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                sys.stdout.write(line)
            code = process.wait()
            errors = [line for line in server.log().splitlines() if '"level": "error"' in line or "Traceback" in line]
            for line in errors:
                sys.stderr.write(f"log of the service: {line}\n")
            summary = re.findall(r"^ *([\d,]+ generated.*)$", "".join(output), re.MULTILINE)
            if arguments.record and summary:
                findings = "finding" if code or errors else "none"
                record("`make contract`", f"{summary[-1]}, seed {arguments.seed}", time.monotonic() - began, findings)
            return code or bool(errors)
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
