"""API keys: authorisation, logged names, and owners of reconstructions."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import tempfile
import timeit
from collections import Counter
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
    """A clock that the test sets."""

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
    """A known key returns its name; a wrong key, an empty key, a hash of the file and a name return None."""
    keys = ApiKeys(keys_file)
    assert keys.owner(ALICE.encode()) == "alice"
    assert keys.owner(BOB.encode()) == "bob"
    digest = hashlib.sha256(ALICE.encode()).hexdigest().encode()
    assert [keys.owner(wrong) for wrong in (b"", b"alice", digest, b"\xff" * 5000)] == [None] * 4
    assert keys.owner(b"\t" + ALICE.encode() + b" ") == "alice"


def test_files_of_every_editor_are_read(tmp_path: Path) -> None:
    """CRLF, blanks around a line and a comment after a key have no effect."""
    path = tmp_path / "api_keys"
    alice, bob = line(ALICE, "alice").strip(), line(BOB, "bob").strip()
    path.write_bytes(f"# keys\r\n\t{alice} \t\r\n \r\n{bob}# since May".encode())
    keys = ApiKeys(path)
    assert (keys.owner(ALICE.encode()), keys.owner(BOB.encode())) == ("alice", "bob")


@pytest.mark.parametrize(("length", "taken"), [(1023, True), (1024, True), (1025, False), (5000, False)])
def test_a_line_has_1024_bytes_at_most(tmp_path: Path, length: int, taken: bool) -> None:
    """The end of the line does not count. A longer line is rejected, wherever in the file it is."""
    path = tmp_path / "api_keys"
    path.write_text(line(BOB, "bob") + (line(ALICE, "alice").strip() + " #").ljust(length, "x") + "\n")
    with contextlib.nullcontext() if taken else pytest.raises(KeysError, match="line 2"):
        assert ApiKeys(path).owner(ALICE.encode()) == "alice"


def test_a_key_has_one_name(tmp_path: Path) -> None:
    """A file that gives the same key two names is rejected; the same line twice is not."""
    path = tmp_path / "api_keys"
    path.write_text(line(ALICE, "alice") * 2)
    assert ApiKeys(path).owner(ALICE.encode()) == "alice"
    for names in (("alice", "bob"), ("bob", "alice")):
        path.write_text("".join(line(ALICE, name) for name in names))
        with pytest.raises(KeysError, match="line 2"):
            ApiKeys(path)


def test_the_file_is_read_again_when_it_changes(keys_file: Path) -> None:
    """Without a restart, an added key works and a removed key stops working after one second."""
    clock = Clock()
    keys = ApiKeys(keys_file, clock=clock)
    new = keys_file.with_suffix(".new")
    new.write_text(line("another", "carol") + line(ALICE, "alice"))
    new.replace(keys_file)
    clock.now = 1.1
    assert (keys.owner(b"another"), keys.owner(ALICE.encode()), keys.owner(BOB.encode())) == ("carol", "alice", None)


def test_the_file_is_examined_once_per_second(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first request on, the file is checked once per second at most."""
    clock, examined = Clock(), []
    clock.now = 10.25
    keys = ApiKeys(keys_file, clock=clock)
    state = keys._state
    monkeypatch.setattr(keys, "_state", lambda: (examined.append(clock.now), state())[1])
    for clock.now in (10.25, 10.5, 11.2, 11.25, 11.5, 12.2, 12.25, 12.5):
        assert keys.owner(ALICE.encode()) == "alice"
    assert examined == [11.25, 12.25]


def test_each_new_fault_of_the_file_is_logged(keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new fault is logged, a lasting fault is logged once, and the return to a valid file is logged."""
    clock = Clock()
    keys = ApiKeys(keys_file, clock=clock)
    faults = ["x\n", "x\n", "\n\nx\n", "\nx\n", "\n\nx\n", line(BOB, "bob")]
    for number, content in enumerate(faults, 1):
        keys_file.write_text(content)
        clock.now = number * 1.5
        keys.owner(ALICE.encode())
    assert [record.getMessage().partition(": ")[2][:6] for record in caplog.records] == [
        "line 1",
        "line 3",
        "line 2",
        "line 3",
        "",
    ]
    assert caplog.records[-1].names == ["bob"]  # type: ignore[attr-defined]


async def test_keys_rotate_under_load(make_settings: Callable[..., Settings], keys_file: Path) -> None:
    """In 20 rotations under load, each request with a key in the file succeeds, and each other key gets 401."""
    clock, statuses = Clock(), Counter[tuple[str, int]]()
    async with running(make_settings(api_keys_file=keys_file), clock=clock) as client:

        async def ask(kind: str, key: str) -> None:
            statuses[kind, (await client.get("/models", headers={"x-api-key": key})).status_code] += 1

        def write(*keys: str) -> None:
            draft = keys_file.with_suffix(".draft")
            draft.write_text("".join(line(key, "alice") for key in keys))
            draft.replace(keys_file)
            clock.now += 1.5

        old = ALICE
        for number in range(20):
            new = f"key-number-{number}"
            write(old, new)
            await asyncio.gather(*(ask("valid", key) for key in (old, new) * 4), ask("wrong", f"{new}0"))
            write(new)
            await asyncio.gather(*(ask("valid", new) for _ in range(4)), ask("removed", old))
            old = new
    assert statuses == {("valid", 200): 240, ("removed", 401): 20, ("wrong", 401): 20}


def test_a_check_costs_the_same_with_many_keys(tmp_path: Path) -> None:
    """The time of a check depends neither on the number of keys nor on the number of right characters."""

    def seconds(keys: ApiKeys, key: bytes) -> float:
        return min(timeit.repeat(lambda: keys.owner(key), number=200, repeat=30))

    one, many = tmp_path / "one", tmp_path / "many"
    one.write_text(line(ALICE, "alice"))
    many.write_text(line(ALICE, "alice") + "".join(line(f"key {number}", "other") for number in range(2000)))
    few_keys, many_keys = ApiKeys(one), ApiKeys(many)
    assert seconds(many_keys, ALICE.encode()) < 3 * seconds(few_keys, ALICE.encode())
    near, far = ALICE[:-1].encode() + b"x", b"x" * len(ALICE)
    assert 0.5 < seconds(many_keys, near) / seconds(many_keys, far) < 2


@pytest.mark.parametrize("damage", ["", "# nobody\n", "secret alice\n", "\udcff"])
def test_a_damaged_file_changes_nothing(keys_file: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """While the file is malformed, the known keys stay valid, and an error is logged that does not quote the file."""
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
    """A file of keys that becomes readable is loaded; the read error is logged once."""
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
    """A missing, empty or malformed file is rejected, and the message does not quote its content."""
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
    """Probes, metrics and the files of the web page are public; all other routes are not."""
    assert is_public(path) is public


async def test_every_route_but_the_public_ones_wants_a_key(
    make_settings: Callable[..., Settings], keys_file: Path, zero: bytes
) -> None:
    """Without a valid key, every route returns a 401 problem with a challenge, except for the probes."""
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
    """Log, metrics and replies contain names of keys, but no keys and no hashes of them, for statuses 200 and 401."""
    server = make_server(ANOMALY_API_KEYS_FILE=str(keys_file), ANOMALY_LOG_LEVEL="debug").start()
    shown = ""
    with server.client() as client:
        for key, status in ((ALICE, 200), ("a-wrong-key-indeed", 401)):
            headers = {**PNG, "x-api-key": key}
            response = client.post("/score", content=zero, headers=headers)
            assert response.status_code == status
            for reply in (
                response,
                client.post("/score", content=zero, headers={**headers, "content-type": "text/html"}),
                client.post("/score?alpha=x", content=zero[:50], headers=headers),
                client.post(f"/score?key={key}", content=zero, headers=headers),
                client.get("/nothing", headers=headers),
                client.get("/openapi.json", headers=headers),
                client.get("/readyz", headers=headers),
                client.get("/metrics", headers=headers),
            ):
                shown += reply.text + str(reply.headers)
    server.stop()
    log = server.log()
    assert '"key_name":"alice"' in log
    for secret in (ALICE, "a-wrong-key-indeed", hashlib.sha256(ALICE.encode()).hexdigest()):
        assert secret not in log
        assert secret not in shown


def test_the_process_refuses_to_start_without_its_keys(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """A keys file that is not there ends the start with code 2 and one line, never in a service that is open."""
    server = make_server(ANOMALY_API_KEYS_FILE=str(tmp_path / "none")).start(wait=False)
    assert server.process is not None
    assert server.process.wait(30) == 2
    assert server.log().strip() == "cannot start: the file of the API keys cannot be read"


async def test_the_public_paths_are_these(make_settings: Callable[..., Settings], keys_file: Path) -> None:
    """The list is written here a second time, so that no path becomes public by a mistake in the first one."""
    public = {"/", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/problems", "/page/page.js"}
    public |= {"/v2/health/live", "/v2/health/ready"}
    protected = {
        "/score",
        "/score/batch",
        "/models",
        "/models/zero",
        "/reconstruction/a",
        "/none",
        "/docs/",
        "/page",
    }
    async with running(make_settings(api_keys_file=keys_file)) as client:
        documented = client.app.framework.openapi()["paths"]  # type: ignore[attr-defined]
        open_paths = {
            path for path, methods in documented.items() for each in methods.values() if "security" not in each
        }
        assert {path for path in open_paths if not path.startswith(("/page/", "/problems/"))} <= public
        for path in public | protected:
            assert ((await client.get(path)).status_code != 401) is (path in public), path


def test_changed_keys_are_logged_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log line about new keys contains the names, and no digest."""
    now, path = [0.0], tmp_path / "keys"
    digests = [hashlib.sha256(key).hexdigest() for key in (b"one", b"two")]
    path.write_text(f"{digests[0]} first\n")
    keys = ApiKeys(path, clock=lambda: now[0])
    path.write_text(f"{digests[1]} second\n{digests[0]} first\n")
    now[0] += 60
    with caplog.at_level(logging.WARNING):
        assert keys.owner(b"two") == "second"
    (record,) = caplog.records
    assert (record.getMessage(), record.names) == ("API keys changed", ["first", "second"])  # type: ignore[attr-defined]
    assert digests[0] not in str(vars(record))
