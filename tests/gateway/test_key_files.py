"""Service and gateway read every file of API keys in the same way."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from app.http.auth import ApiKeys, KeysError
from tests.gateway.conftest import Both
from tests.gateway.process import GATEWAY, LIMITS, Gateway, gateway
from tests.gateway.recorded import exchange

ALICE, BOB = "key-of-alice", "key-of-bob"
A, B = (hashlib.sha256(key.encode()).hexdigest() for key in (ALICE, BOB))
VALID: dict[str, tuple[bytes, str]] = {
    "plain": (f"{A} alice\n{B} bob\n".encode(), "alice bob"),
    "no line end": (f"{A} alice\n{B} bob".encode(), "alice bob"),
    "CRLF": (f"{A} alice\r\n\r\n{B} bob\r\n".encode(), "alice bob"),
    "blanks": (f" \t{A}\t  alice \t\n\t\n".encode(), "alice"),
    "comments": (f"# keys\n  # indented\n{A} alice # since May\n{B} bob#\n#\tend".encode(), "alice bob"),
    "a key that is commented out": (f"#{A} alice\n # {A} alice\n{B} bob\n".encode(), "bob"),
    "a key behind a name": (f"{A} alice #{B} bob\n".encode(), "alice"),
    "a key twice": (f"{A} alice\n{A} alice\n".encode(), "alice"),
    "two keys of one name": (f"{A} alice\n{B} alice\n".encode(), "alice alice"),
    "all characters of a name": (f"{A} {'a.B_9-' * 10}\n".encode(), "a.B_9-" * 10),
    "the longest line": (f"{A} alice #{'x' * (1024 - 72)}\n".encode(), "alice"),
}
"""Content, and the names of Alice's and Bob's key if they work."""
INVALID: dict[str, bytes] = {
    "empty": b"",
    "comments only": b"# nobody\n\r\n",
    "byte order mark": f"\ufeff{A} alice\n".encode(),
    "UTF-16": f"{A} alice\n".encode("utf-16"),
    "UTF-16 without a mark": f"{A} alice\n".encode("utf-16-le"),
    "form feed before a key": f"\f{A} alice\n".encode(),
    "form feed between key and name": f"{A}\falice\n".encode(),
    "form feed in a comment": f"{B} bob\n#\f{A} alice\n".encode(),
    "vertical tab": f"{A}\valice\n".encode(),
    "CR alone as the line end": f"{A} alice\r{B} bob\r".encode(),
    "CR in a comment": f"{B} bob\n# old\r{A} alice\n".encode(),
    "two CR": f"{A} alice\r\r\n".encode(),
    "NUL in a comment": f"{A} alice # a\0b\n".encode(),
    "other characters": f"{A} alice\n# Schlüssel\n".encode(),
    "no-break space": f"{A}\u00a0alice\n".encode(),
    "line separator": f"{A} alice\u2028{B} bob\n".encode(),
    "upper case": f"{A.upper()} alice\n".encode(),
    "digest too short": f"{A[:-1]} alice\n".encode(),
    "digest too long": f"{A}0 alice\n".encode(),
    "no name": f"{A}\n".encode(),
    "name too long": f"{A} {'a' * 65}\n".encode(),
    "name with a slash": f"{A} a/b\n".encode(),
    "two names": f"{A} alice bob\n".encode(),
    "colon": f"{A}: alice\n".encode(),
    "a key itself": f"{ALICE} alice\n".encode(),
    "two names of a key": f"{A} alice\n{A} bob\n".encode(),
    "a line that is too long": f"{A} alice #{'x' * (1025 - 72)}\n".encode(),
    "a line beyond a buffer": f"{B} bob #{'x' * 98_230}{A} alice\n".encode(),
}


def complaint(file: Path) -> str:
    """Return why the gateway's start script rejects a file; empty if it starts HAProxy."""
    script = (GATEWAY / "start").read_text()
    for shipped, own in (
        ("keys=/run/keys/api_keys", f"keys={file}"),
        ("/tmp/known", f"{file}.known"),
        ("exec haproxy", "exec true"),
    ):
        assert shipped in script
        script = script.replace(shipped, own)
    environment = {**os.environ, **LIMITS}
    done = subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode == 2) == done.stderr.startswith("cannot start: "), done
    return done.stderr.removeprefix("cannot start: ").strip()


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_file_is_rejected_by_both_in_the_same_words(tmp_path: Path, name: str) -> None:
    """The message of the service and that of the gateway are equal, and do not quote the file."""
    file = tmp_path / "api_keys"
    file.write_bytes(INVALID[name])
    with pytest.raises(KeysError) as caught:
        ApiKeys(file)
    assert complaint(file) == str(caught.value)
    assert "alice" not in str(caught.value)


def test_a_missing_file_is_rejected_by_both(tmp_path: Path) -> None:
    """The message of the service and that of the gateway are equal."""
    with pytest.raises(KeysError) as caught:
        ApiKeys(tmp_path / "api_keys")
    assert complaint(tmp_path / "api_keys") == str(caught.value)


@pytest.mark.parametrize("name", VALID)
def test_a_valid_file_has_the_same_keys_for_both(both: Both, tmp_path: Path, name: str) -> None:
    """HAProxy itself accepts the keys that the service accepts, under the same names, and no other key."""
    content, names = VALID[name]
    for file in ("keys/api_keys", "tls/tls.pem", "certificate.pem"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((both.gateway.folder / file).read_bytes())
    file = tmp_path / "keys" / "api_keys"
    file.write_bytes(content)
    assert complaint(file) == ""
    keys = ApiKeys(file)
    owners = [keys.owner(key.encode()) for key in (ALICE, BOB)]
    assert " ".join(owner for owner in owners if owner) == names
    with gateway(tmp_path, both.service.port, ALICE) as started:
        found = [through(started, both, key) for key in (ALICE, BOB, "", "#", ALICE.upper())]
    assert found == [*owners, None, None, None]


def through(started: Gateway, both: Both, key: str) -> str | None:
    """Return the name that a gateway logs for a key; None if it rejects the key.

    The service behind it has another file, and answers 401 to the keys that the gateway accepts.
    """
    request = (
        f"GET /models HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key} \r\nX-Request-ID: try{len(started.log())}\r\n\r\n"
    )
    head, _ = exchange(Both(both.service, started), request.encode(), gateway=True)
    assert head.startswith(b"HTTP/1.1 401 ")
    return started.logged_name(f"try{request.partition('try')[2].split()[0]}")


def test_blanks_around_a_key_are_not_part_of_it(both: Both) -> None:
    """Blanks after a header value are not part of the value (RFC 9110, 5.5), directly and through the gateway."""
    for gateway_too in (False, True):
        request = f"GET /models HTTP/1.1\r\nHost: localhost\r\nX-API-Key: \t{both.key} \t\r\n\r\n"
        head, _ = exchange(both, request.encode(), gateway=gateway_too)
        assert head.startswith(b"HTTP/1.1 200 ")
