"""`anomaly validity`: the table, the exit codes, and errors in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from anomaly import Client
from anomaly.client.replies import validity_of
from tests.cli.conftest import Anomaly
from tests.conftest import Server

DOCUMENT = {
    "model": "zero", "version": 3, "status": "changed", "reason": "images score differently", "images": 12_345,
    "p_value": 1.2e-5, "evidence_log10": 4.5, "anomalous": {"share": 0.021, "low": 0.017, "high": 0.026, "alpha": 0.01},
}  # fmt: skip


def test_it_shows_all_models_of_a_service(server: Server, in_process: Anomaly) -> None:
    """Each model has a line; the exit code is 0 while none has changed."""
    done = in_process("validity", "--url", server.url)
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["zero@1", "valid"],
        ["zero-article@1", "valid"],
    ]
    assert in_process("validity", "zero", "--url", server.url).stdout.count("@") == 1
    assert in_process("validity", "zero@1", "--url", server.url).stdout.count("@") == 1
    other = in_process("validity", "zero@2", "--url", server.url)
    assert (other.returncode, other.stdout) == (2, "")
    assert "zero@2 is not the current version, which is zero@1" in other.stderr


def test_an_unknown_model_is_an_error(server: Server, in_process: Anomaly) -> None:
    """An unknown model is one line, with exit code 2."""
    done = in_process("validity", "seven", "--url", server.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "'seven'" in done.stderr


def test_a_change_has_its_own_exit_code(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a model has changed, the exit code is 1, and the reason has a line."""
    monkeypatch.setattr(Client, "validity", lambda *_: validity_of(DOCUMENT))
    assert run("validity", "zero") == 1
    written = capsys.readouterr().out
    assert "12,345" in written
    assert "2.10% (1.70% to 2.60%)" in written
    assert "images score differently" in written
