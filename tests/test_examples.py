"""The code blocks of the documentation work against a service that `make serve` starts, in curl, Python and Node.js."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import EXAMPLES, ROOT, TRUSTS_NOBODY, free_port
from tests.waiting import wait_until

PAGES = ("README.md", "docs/quickstart.md", "docs/images.md", "docs/client.md", "docs/api.md")
LANGUAGES = ("python", "console", "javascript")
"""In this order, because a Python example writes the array that a curl example sends."""
ELSEWHERE = re.compile(r"make (?:serve|test)\b|docker |git clone|cd |anomaly |cat ")
"""Commands of `console` blocks that other tests run: the fixture below, tests/containers and tests/cli."""
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ID = re.compile(r"\b[0-9a-f]{44}\b")
NODE = """
const request = globalThis.fetch;
globalThis.fetch = async (...given) => {
  const reply = await request(...given);
  if (!reply.ok) throw new Error(`${given[0]}: ${reply.status} ${await reply.text()}`);
  return reply;
};
for (const file of process.argv.slice(1)) await import(file);
"""
CURL = """set -euo pipefail
curl() { command curl --silent --show-error --fail-with-body "$@"; }
score() { curl "$@" | tee score.json; id=$(grep -o '[0-9a-f]\\{44\\}' score.json | head -n 1); }
"""


@dataclass(frozen=True)
class Block:
    """A code block of a page: its language and its text."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page."""
    return [Block(*found) for found in FENCE.findall((ROOT / page).read_text())]


def commands(block: Block) -> list[str]:
    """Return the commands of a `console` block, without the output that it shows."""
    joined = block.text.replace("\\\n", " ")
    return [
        line.removeprefix("$ ").partition("  #")[0].strip() for line in joined.splitlines() if line.startswith("$ ")
    ]


@dataclass(frozen=True)
class Service:
    """A service that the examples call, and the folder in which they run."""

    url: str
    folder: Path

    def run(self, *command: str, text: str | None = None) -> str:
        """Return the output of a command that must succeed."""
        done = subprocess.run(
            command, cwd=self.folder, input=text, capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def served(self) -> dict[str, float]:
        """Return the number of responses with status 200 per route."""
        text = httpx.get(f"{self.url}/metrics", verify=TRUSTS_NOBODY).text
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        return {
            each.labels["route"]: each.value
            for each in samples
            if each.name == "anomaly_http_requests_total" and each.labels["status"] == "200"
        }

    def run_blocks(self, language: str, found: list[Block]) -> None:
        """Run the blocks of one language in their order."""
        here = [
            Block(each.language, re.sub(r"(?:http://)?(?:localhost|127\.0\.0\.1):8000", self.url, each.text))
            for each in found
            if each.language == language
        ]
        if language == "console":
            lines = [line for block in here for line in commands(block) if not ELSEWHERE.match(line)]
            # README shows the id that its score has returned; here the id is another one.
            shown = [ID.sub("$id", re.sub(r"'([^']*[0-9a-f]{44}[^']*)'", r'"\1"', line)) for line in lines]
            scored = [re.sub(r"^curl (?=.*/score(?:$|\?))", "score ", line) for line in shown]
            self.run("bash", text=CURL + "\n".join(scored))
            return
        files = []
        for number, block in enumerate(here):
            files.append(self.folder / f"example-{number}.{'py' if language == 'python' else 'mjs'}")
            files[-1].write_text(block.text)
        names = [str(file) for file in files]
        if language == "python":
            self.run(sys.executable, "-c", "import runpy, sys\nfor each in sys.argv[1:]: runpy.run_path(each)", *names)
        else:
            self.run("node", "--input-type=module", "--eval", NODE, *names)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield a service that `make serve` has started, without the installation."""
    folder, port = tmp_path_factory.mktemp("examples"), free_port()
    (folder / "examples").symlink_to(EXAMPLES)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANOMALY_")}
    # BIN: the interpreter of this test run, which need not be in .venv.
    command = ["make", "--old-file=.venv/serving", "serve", f"PORT={port}", f"BIN={Path(sys.executable).parent}"]
    environment |= {"ANOMALY_STORE_URL": f"sqlite:///{folder}/reconstructions.db", "ANOMALY_DEVICE": "cpu"}
    with (
        (folder / "service.log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        found = Service(f"http://127.0.0.1:{port}", folder)

        def ready() -> bool:
            assert process.poll() is None, (folder / "service.log").read_text()
            try:
                return httpx.get(f"{found.url}/readyz", verify=TRUSTS_NOBODY).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(ready, 60)
            yield found
        finally:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.process
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(service: Service, page: str) -> None:
    """Every block of a page in curl, Python or JavaScript runs without an error; every reply has a status below 400."""
    for program in ("curl", "node"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    found = blocks(page)
    assert found
    for language in LANGUAGES:
        before = service.served()
        service.run_blocks(language, found)
        if page == "docs/api.md":
            _check_routes(service, language, before)


def _check_routes(service: Service, language: str, before: dict[str, float]) -> None:
    """Fail if the examples of a language in the API reference have not called each route with success."""
    after = service.served()
    # The first call of `served` is a request for /metrics, too.
    called = {route for route, count in after.items() if count - before.get(route, 0) > (route == "/metrics")}
    described = httpx.get(f"{service.url}/openapi.json", verify=TRUSTS_NOBODY).json()["paths"]
    # The inference protocol (/v1, /v2) has its own page and is tested with its public clients.
    ours = {path for path in described if not path.startswith(("/v1", "/v2"))}
    routes = {*ours, "/", "/docs", "/openapi.json", "/problems", "/problems/{name}"}
    assert routes - called == set(), f"docs/api.md has no {language} example of these routes"


def test_every_block_is_tested() -> None:
    """Every block of these pages is in a language that runs, and every command that runs elsewhere exists."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for block in blocks(page):
            assert block.language in (*LANGUAGES, "json", "text"), f"{page}: {block}"
            for line in commands(block) if block.language == "console" else []:
                assert line.startswith("curl ") or re.match(r"id=\$\(curl ", line) or ELSEWHERE.match(line), line
                assert not line.startswith("make ") or line.split()[1] in targets, line
