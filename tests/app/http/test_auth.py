"""API keys: who gets in, what is written down of it, whose a reconstruction is."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.http.auth import ApiKeys, KeysError, is_public
from app.settings import Settings
from tests.conftest import Server, running, unprivileged

PNG = {"content-type": "image/png"}
ALICE, BOB, ALICE_2 = "key-of-alice-0123456789", "key-of-bob-0123456789", "key-of-alice-after-rotation"


def line(key: str, name: str) -> str:
    """Return the line of the keys file for a key."""
    return f"{hashlib.sha256(key.encode()).hexdigest()} {name}\n"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the seconds that have passed."""
        return self.now


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """Return a file with the keys of alice, who has two, and bob."""
    path = tmp_path / "api_keys"
    path.write_text("# who may ask\n\n" + line(ALICE, "alice") + line(BOB, "bob") + line(ALICE_2, "alice"))
    return path


def test_a_key_has_the_name_of_its_line(keys_file: Path) -> None:
    """A known key gives its name; a wrong one, an empty one, one of the hashes and a name give none."""
    keys = ApiKeys(keys_file)
    assert keys.owner(ALICE.encode()) == "alice"
    assert keys.owner(BOB.encode()) == "bob"
    digest = hashlib.sha256(ALICE.encode()).hexdigest().encode()
    assert [keys.owner(wrong) for wrong in (b"", b"alice", digest, ALICE.encode() + b" ", b"\xff" * 5000)] == [None] * 5


def test_files_of_every_editor_are_read(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blanks around a line and a comment behind a key change nothing."""
    path = tmp_path / "api_keys"
    alice, bob = line(ALICE, "alice").strip(), line(BOB, "bob").strip()
    path.write_bytes(f"\ufeff# keys\r\n\t{alice} \t\r\n \r\n{bob}# since May".encode())
    keys = ApiKeys(path)
    assert (keys.owner(ALICE.encode()), keys.owner(BOB.encode())) == ("alice", "bob")


def test_a_key_has_one_name(tmp_path: Path) -> None:
    """A file that gives the same key two names is rejected; the same line twice is not."""
    path = tmp_path / "api_keys"
    path.write_text(line(ALICE, "alice") * 2)
    assert ApiKeys(path).owner(ALICE.encode()) == "alice"
    path.write_text(line(ALICE, "alice") + line(ALICE, "bob"))
    with pytest.raises(KeysError, match="line 2"):
        ApiKeys(path)


def test_the_file_is_read_again_when_it_changes(keys_file: Path) -> None:
    """A key added to the file works and a key taken out stops working, a second later and without a restart."""
    clock = Clock()
    keys = ApiKeys(keys_file, clock=clock)
    new = keys_file.with_suffix(".new")
    new.write_text(line("another", "carol") + line(ALICE, "alice"))
    new.replace(keys_file)
    clock.now = 1.1
    assert (keys.owner(b"another"), keys.owner(ALICE.encode()), keys.owner(BOB.encode())) == ("carol", "alice", None)


@pytest.mark.parametrize("damage", ["", "# nobody\n", "secret alice\n", "\udcff"])
def test_a_damaged_file_changes_nothing(keys_file: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """While the file makes no sense the known keys stay in force, an error is logged, and the file is not quoted."""
    clock = Clock()
    keys = ApiKeys(keys_file, clock=clock)
    keys_file.write_bytes(damage.encode("utf-8", "surrogateescape"))
    clock.now = 1.1
    assert keys.owner(ALICE.encode()) == "alice"
    assert "API keys not changed" in caplog.text
    assert "secret" not in caplog.text
    keys_file.unlink()
    clock.now = 2.2
    assert keys.owner(ALICE.encode()) == "alice"


def test_a_file_that_becomes_readable_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """Keys that nobody could read at first are taken up when somebody can; the fault is logged once."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path, draft = Path(folder) / "keys", Path(folder) / "draft"
        path.write_text(line(ALICE, "alice"))
        keys = ApiKeys(path, clock=clock)
        draft.write_text(line(BOB, "bob"))
        draft.chmod(0)
        draft.rename(path)
        with unprivileged():
            for clock.now in (1.1, 2.2, 3.3):
                assert keys.owner(BOB.encode()) is None
        path.chmod(0o444)
        clock.now = 4.4
        assert keys.owner(BOB.encode()) == "bob"
    assert caplog.text.count("API keys not changed") == 1


@pytest.mark.parametrize("content", [None, "", "# nobody\n", "secret alice\n", f"{'a' * 64}\n", f"{'a' * 64} a/b\n"])
def test_no_start_with_a_file_that_lets_nobody_in(tmp_path: Path, content: str | None) -> None:
    """A missing, empty or malformed file is refused, in words that do not quote it."""
    path = tmp_path / "api_keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(KeysError) as refusal:
        ApiKeys(path)
    assert "secret" not in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "public"),
    [("/", True), ("/livez", True), ("/page/draw.js", True), ("/score", False), ("/models", False), ("/pages", False)],
)
def test_what_answers_without_a_key(path: str, public: bool) -> None:
    """Probes, metrics and what a browser must load first are public; everything else is not."""
    assert is_public(path) is public


async def test_every_route_but_the_public_ones_wants_a_key(
    make_settings: Callable[..., Settings], keys_file: Path, zero: bytes
) -> None:
    """Without a key or with a wrong one every route answers 401 as a problem with a challenge; probes answer."""
    async with running(make_settings(api_keys_file=keys_file)) as client:
        documented = client.app.framework.openapi()["paths"]  # type: ignore[attr-defined]
        paths = sorted(documented)
        assert "/score" in paths
        for path, methods in documented.items():
            for operation in methods.values():
                assert ("security" in operation) == ("401" in operation["responses"]) == (not is_public(path)), path
        for path in [*paths, "/nothing/here", "/score/", "/page", "/metrics/"]:
            if is_public(path):
                assert (await client.get(path)).status_code == 200, path
                continue
            for headers in ({}, {"x-api-key": "wrong"}, {"authorization": f"Bearer {ALICE}"}):
                method = "POST" if "score" in path else "GET"
                response = await client.request(method, path, headers={**PNG, **headers}, content=zero)
                assert response.status_code == 401, path
                if path.startswith(("/v1/", "/v2")):
                    assert "API key" in response.json()["error"]
                else:
                    assert response.json()["type"] == "/problems/unauthorized"
                assert response.headers["www-authenticate"].startswith("ApiKey")
        assert (await client.post("/score", content=zero, headers={**PNG, "x-api-key": ALICE})).status_code == 200


async def test_a_reconstruction_is_found_only_by_its_owner(
    make_settings: Callable[..., Settings], keys_file: Path, zero: bytes
) -> None:
    """Another key's owner gets the same 404 as for an id that never was; a second key of the same name gets it."""
    async with running(make_settings(api_keys_file=keys_file)) as client:
        scored = (await client.post("/score", content=zero, headers={**PNG, "x-api-key": ALICE})).json()

        async def fetch(key: str, path: str = scored["reconstruction"]) -> httpx.Response:
            return await client.get(path, headers={"x-api-key": key})

        assert (await fetch(ALICE)).status_code == 200
        assert (await fetch(ALICE_2)).content == (await fetch(ALICE)).content
        foreign, unknown = await fetch(BOB), await fetch(BOB, "/reconstruction/" + "0" * 32)
        assert foreign.status_code == unknown.status_code == 404
        assert foreign.json()["type"] == unknown.json()["type"]


def test_a_key_is_never_written_down(make_server: Callable[..., Server], keys_file: Path, zero: bytes) -> None:
    """The log names who asked and holds neither keys nor their hashes, on success and on refusal."""
    server = make_server(ANOMALY_API_KEYS_FILE=str(keys_file), ANOMALY_LOG_LEVEL="debug").start()
    with server.client() as client:
        for key, status in ((ALICE, 200), ("a-wrong-key-indeed", 401)):
            response = client.post("/score", content=zero, headers={**PNG, "x-api-key": key})
            assert response.status_code == status
            assert key not in response.text + str(response.headers)
    server.stop()
    log = server.log()
    assert '"key_name":"alice"' in log
    for secret in (ALICE, "a-wrong-key-indeed", hashlib.sha256(ALICE.encode()).hexdigest()):
        assert secret not in log


def test_the_process_refuses_to_start_without_its_keys(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """A keys file that is not there ends the start with code 2 and one line, never in a service that is open."""
    server = make_server(ANOMALY_API_KEYS_FILE=str(tmp_path / "none")).start(wait=False)
    assert server.process is not None
    assert server.process.wait(30) == 2
    assert server.log().strip() == "cannot start: the file of the API keys cannot be read"
