"""Files that an editor or PowerShell on Windows has written: byte order marks, UTF-16, CRLF."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from anomaly.client.environment import api_key
from app.http.auth import ApiKeys, KeysError
from app.models.repository import Repository, RepositoryError
from app.stores.redis import Credentials
from tests.conftest import ROOT

WINDOWS = {
    "UTF-8 with a byte order mark": b"\xef\xbb\xbf" + b"7\r\n",
    "UTF-16, little-endian": b"\xff\xfe" + "7\r\n".encode("utf-16-le"),
    "UTF-16, big-endian": b"\xfe\xff" + "7\r\n".encode("utf-16-be"),
    "CRLF": b"7\r\n",
}
KEYS = f"{hashlib.sha256(b'secret').hexdigest()} alice\r\n"
LIMITS = dict(re.findall(r"\b([A-Z_]+)=(\d+)", (ROOT / "deploy" / "gateway" / "Dockerfile").read_text()))


@pytest.mark.parametrize("content", WINDOWS.values(), ids=WINDOWS)
def test_files_of_one_line_are_read(tmp_path: Path, content: bytes) -> None:
    """CURRENT, the key file of the client and the password file of Redis may have any of these encodings."""
    folder = tmp_path / "zero"
    folder.mkdir()
    (folder / "CURRENT").write_bytes(content)
    assert Repository(tmp_path).current("zero") == 7
    assert api_key(folder / "CURRENT") == "7"
    assert Credentials(None, folder / "CURRENT").get_credentials() == ("7",)


@pytest.mark.parametrize("content", [b"\xff7\n", "７".encode(), "7".encode("utf-16-le")])
def test_what_is_no_number_is_named(tmp_path: Path, content: bytes) -> None:
    """A number in another encoding, or in the digits of another script, is not accepted as a version."""
    folder = tmp_path / "zero"
    folder.mkdir()
    (folder / "CURRENT").write_bytes(content)
    with pytest.raises(RepositoryError, match="CURRENT"):
        Repository(tmp_path).current("zero")


ENCODED = {
    "UTF-8 with a byte order mark": (b"\xef\xbb\xbf" + KEYS.encode(), "byte order mark"),
    "UTF-16, little-endian": (b"\xff\xfe" + KEYS.encode("utf-16-le"), "UTF-16"),
    "UTF-16, big-endian": (b"\xfe\xff" + KEYS.encode("utf-16-be"), "UTF-16"),
    "UTF-16 without a mark": (KEYS.encode("utf-16-le"), "UTF-16"),
}


@pytest.mark.parametrize(("content", "words"), ENCODED.values(), ids=ENCODED)
def test_the_encoding_of_a_key_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    """The message names the encoding and never the content."""
    (tmp_path / "api_keys").write_bytes(content)
    with pytest.raises(KeysError, match=words) as caught:
        ApiKeys(tmp_path / "api_keys")
    assert "alice" not in str(caught.value)


def test_a_character_that_is_not_ascii_is_found_by_its_line(tmp_path: Path) -> None:
    """Service and gateway reject the same lines."""
    (tmp_path / "api_keys").write_bytes(KEYS.encode() + "# Schlüssel\n".encode())
    with pytest.raises(KeysError, match="line 2"):
        ApiKeys(tmp_path / "api_keys")


def start_gateway(folder: Path, content: bytes) -> str:
    """Return the standard error of the gateway's start script for a key file."""
    (folder / "api_keys").write_bytes(content)
    script = (ROOT / "deploy" / "gateway" / "start").read_text()
    changed = script.replace("keys=/run/keys/api_keys", f"keys={folder / 'api_keys'}").replace(
        "exec haproxy", "exec echo starts >&2"
    )
    assert changed.count(str(folder)) == 1
    changed = changed.replace("/tmp/known", str(folder / "known"))
    done = subprocess.run(
        ["sh", "-c", changed], env={**os.environ, **LIMITS}, capture_output=True, text=True, check=False, timeout=30
    )
    return done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [*ENCODED.values(), (b"", "contains no key")],
)
def test_the_gateway_names_the_encoding(tmp_path: Path, content: bytes, words: str) -> None:
    """The gateway does not start with a file that HAProxy would misread, and prints the reason."""
    said = start_gateway(tmp_path, content)
    assert said.startswith("cannot start: ")
    assert words in said


def test_the_gateway_starts_with_crlf(tmp_path: Path) -> None:
    """CRLF after a name counts as white space."""
    assert start_gateway(tmp_path, KEYS.encode()).startswith("starts")
