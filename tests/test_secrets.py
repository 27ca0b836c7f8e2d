"""The script that creates the secrets, in a separate folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.http.auth import ApiKeys
from tests.conftest import ROOT


def secrets(folder: Path, *arguments: str) -> str:
    """Run deploy/secrets for a copy of the project in `folder`, and return the API key that it shows."""
    if not (folder / "deploy").exists():
        (folder / "deploy").mkdir()
        shutil.copy(ROOT / "deploy" / "secrets", folder / "deploy")
    environment = {name: value for name, value in os.environ.items() if name != "SECRETS"}
    command = [folder / "deploy" / "secrets", *arguments]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return said.strip().rpartition(" ")[2]


@pytest.mark.parametrize("line", ["SECRETS={}", 'SECRETS="{}"', "SECRETS=/old\nSECRETS='{}'", "SECRETS={} # here"])
def test_they_are_made_where_env_says(tmp_path: Path, line: str) -> None:
    """The folder that .env names is the one that compose reads: no other one gets secrets or keys."""
    elsewhere, env = tmp_path / "else where", line.format(tmp_path / "else where") + "\n"
    (tmp_path / ".env").write_text(env)
    keys = [secrets(tmp_path), secrets(tmp_path, "key", "second")]
    assert [ApiKeys(elsewhere / "keys" / "api_keys").owner(key.encode()) for key in keys] == ["trial", "second"]
    assert not (tmp_path / "secrets").exists() and (tmp_path / ".env").read_text() == env


@pytest.mark.parametrize("text", [None, "", "TAG=new", "TAG=new\n", "SECRETS=\n"])
def test_env_gets_a_line_of_its_own(tmp_path: Path, text: str | None) -> None:
    """Existing lines of .env are kept, also without a final newline; a second run adds nothing."""
    if text is not None:
        (tmp_path / ".env").write_text(text)
    for _ in range(2):
        secrets(tmp_path)
        assert (tmp_path / ".env").read_text().split() == [*(text or "").split(), "SECRETS=./secrets"]


def test_a_key_gets_a_line_of_its_own(tmp_path: Path) -> None:
    """A key can be added to a list without a final newline."""
    first = secrets(tmp_path)
    path = tmp_path / "secrets" / "keys" / "api_keys"
    path.chmod(0o644)
    path.write_text(path.read_text().rstrip("\n"))
    second = secrets(tmp_path, "key", "second")
    assert [ApiKeys(path).owner(key.encode()) for key in (first, second)] == ["trial", "second"]


def test_keys_that_are_added_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    """Each key that one of ten concurrent runs shows is in the list, and no draft is left."""
    secrets(tmp_path)
    (tmp_path / "secrets" / "keys" / ".api_keys.killed").touch()
    names = [f"client-{number}" for number in range(10)]
    with ThreadPoolExecutor(len(names)) as pool:
        keys = dict(zip(names, pool.map(lambda name: secrets(tmp_path, "key", name), names), strict=True))
    listed = ApiKeys(tmp_path / "secrets" / "keys" / "api_keys")
    assert {name: listed.owner(key.encode()) for name, key in keys.items()} == {name: name for name in names}
    assert [path.name for path in (tmp_path / "secrets" / "keys").iterdir()] == ["api_keys"]


def test_an_empty_password_is_made_again(tmp_path: Path) -> None:
    """An empty password file, which a failed run leaves, is replaced."""
    secrets(tmp_path)
    password = tmp_path / "secrets" / "redis_password"
    made = password.read_text()
    secrets(tmp_path)
    assert password.read_text() == made
    password.chmod(0o644)
    password.write_text("")
    secrets(tmp_path)
    assert len(password.read_text().strip()) == 64
