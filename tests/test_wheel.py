"""The wheel contains only the client and the command, and works next to a project with modules of the same names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, MODEL_STORE, ROOT, Server

pytestmark = pytest.mark.long
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NO_INDEX = re.compile(r"Failed to establish a new connection|name resolution|Network is unreachable")


def plain_environment(**chosen: str) -> dict[str, str]:
    """Return the environment without the variables of this project and without Python's search path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANOMALY_")}
    kept.pop("PYTHONPATH", None)
    return {**kept, "TERMINAL_WIDTH": "200", **chosen}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder and return its exit code and output."""
    return subprocess.run(
        command, cwd=folder, env=plain_environment(), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from a copy of the sources: a build writes into its folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md", "docs/package.md"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in ("anomaly", "app", "training"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(target)],
        cwd=source, env=plain_environment(), check=True,
    )  # fmt: skip
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of a new environment with the wheel and its dependencies."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    command = [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--constraint", str(ROOT / "constraints.txt"), str(wheel)],
        env=plain_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if NO_INDEX.search(done.stderr):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return environment / "bin"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return the folder of another project, whose modules have names that this project uses."""
    folder = tmp_path / "project"
    for name in ("client.py", "cli.py", "app/__init__.py", "app/__main__.py", "training/__init__.py", "pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise RuntimeError('this is another project')\n")
    return folder


def metadata(wheel: Path) -> Message:
    """Return the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_contains_one_package(wheel: Path) -> None:
    """The wheel contains `anomaly` and its metadata, with the marker for type checkers and the licence."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"anomaly"}
    assert "anomaly/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "anomaly").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_metadata_is_complete(wheel: Path) -> None:
    """Three dependencies; service, training, bulk scoring and traces are extras; development tools are not listed."""
    found = metadata(wheel)
    requirements = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[<>=]", line)[0] for line in requirements) == ["httpx", "rich", "typer"]
    assert sorted(found.get_all("Provides-Extra", [])) == ["bulk", "otel", "serve", "train"]
    for name in ("Author", "Summary", "License-Expression", "Keywords", "Classifier", "Requires-Python"):
        assert found[name], name
    assert "pytest" not in str(found)


def test_the_description_has_no_relative_links(wheel: Path) -> None:
    """The page of a package index shows the description without the files of the project."""
    text = metadata(wheel).get_payload()
    assert isinstance(text, str)
    assert "from anomaly import Client" in text
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []


def test_the_command_scores_with_a_service(installed: Path, project: Path, make_server: Callable[..., Server]) -> None:
    """The installed command prints its version and scores with a service, in a folder of another project."""
    server = make_server().start()
    for command in ([str(installed / "anomaly")], [str(installed / "python"), "-m", "anomaly.cli"]):
        for arguments, words in (
            (["--version"], f"anomaly {PROJECT['version']}"),
            (["score", str(EXAMPLES / "zero.png"), "--url", server.url], "1 image: 1 normal"),
        ):
            done = subprocess.run(
                [*command, *arguments],
                cwd=project,
                env=plain_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, "")
            assert words in done.stdout


def test_the_command_labels_images_without_a_checkout(installed: Path, project: Path, tmp_path: Path) -> None:
    """The installed command shows and labels the images of a review folder, without numpy and Pillow."""
    group = tmp_path / "review" / "queue" / "zero" / "random"
    group.mkdir(parents=True)
    shutil.copy(EXAMPLES / "zero.png", group / "a.png")
    (group / "a.json").write_text('{"id": "a", "chosen": "random"}\n')
    (tmp_path / "labels.csv").write_text("id,label\na,normal\n")
    command = [str(installed / "anomaly"), "review", str(tmp_path / "review")]
    for arguments in (["--sheet", str(tmp_path / "sheet.html")], ["--labels", str(tmp_path / "labels.csv")]):
        done = run([*command, *arguments], project)
        assert done.returncode == 0, done.stderr
    assert "<code>a</code>" in (tmp_path / "sheet.html").read_text()
    assert (tmp_path / "review" / "labelled" / "zero" / "normal" / "a.png").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("train", "--recipe", "article"),
        ("verify",),
        ("score", str(EXAMPLES / "zero.png"), "--model-store", str(MODEL_STORE)),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_of_a_checkout_are_one_line(installed: Path, project: Path, arguments: tuple[str, ...]) -> None:
    """The commands that need the service's code name the checkout and the image, and never run another `app`."""
    for command in ([str(installed / "anomaly")], [str(installed / "python"), "-m", "anomaly.cli"]):
        done = run([*command, *arguments], project)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert "checkout" in done.stderr
        assert "container image anomaly-" in done.stderr


def test_the_client_imports_nothing_of_another_project(installed: Path, project: Path) -> None:
    """`import anomaly` in a folder with `client.py` and `app/` imports neither, and neither numpy nor torch."""
    code = (
        "import sys, anomaly, anomaly.cli.__main__; print(anomaly.__version__, anomaly.__file__)\n"
        "print({'client', 'cli', 'app', 'training', 'numpy', 'torch'} & set(sys.modules))"
    )
    done = run([str(installed / "python"), "-c", code], project)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(PROJECT["version"])
    assert "site-packages" in first
    assert second == "set()"
