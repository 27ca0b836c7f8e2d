"""Settings: valid and invalid values of the environment variables."""

from __future__ import annotations

import re

import httpx
import pytest
from pydantic import ValidationError

from app import settings
from app.settings import Settings, SettingsError


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable with the prefix sets the field of its name."""
    monkeypatch.setenv("ANOMALY_MICROBATCH_MAX_SIZE", "7")
    assert settings.from_environment().microbatch_max_size == 7


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable stops the start and is named."""
    monkeypatch.setenv("ANOMALY_BATCHMAX", "7")
    with pytest.raises(SettingsError, match="ANOMALY_BATCHMAX"):
        settings.from_environment()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "many", "a valid integer, not 'many'"),
        ("PORT", "70000", "less than or equal to 65535, not '70000'"),
        ("DEADLINE_MS", "-1", "greater than 0, not '-1'"),
        ("PORT", 5000 * "x", "a valid integer, not '" + 40 * "x" + "'"),
    ],
    ids=["word", "large", "negative", "long"],
)
def test_bad_values_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    """A value that does not fit stops the start, and the message contains variable, condition and value."""
    monkeypatch.setenv(f"ANOMALY_{name}", value)
    with pytest.raises(SettingsError, match=f"^ANOMALY_{name}: .*{words}$"):
        settings.from_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOST", ""),
        ("DEFAULT_MODEL", ""),
        ("DEFAULT_MODEL", " zero"),
        ("DEFAULT_MODEL", "zero@1"),
        ("MODEL_STORE", ""),
        ("MICROBATCH_MAX_DELAY_MS", "inf"),
        ("DEADLINE_MS", "inf"),
        ("DEADLINE_MS", "nan"),
        ("DRAIN_SECONDS", "inf"),
        ("DRAIN_SECONDS", "1e9"),
        ("STORE_TTL_SECONDS", "inf"),
        ("STORE_TTL_SECONDS", "1e16"),
        ("ROOT_PATH", "/page"),
        ("ROOT_PATH", "/page/deeper"),
        ("ROOT_PATH", "/score"),
        ("ROOT_PATH", "/models/of/mine"),
    ],
)
def test_values_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Values with which the service would never score, never stop, or be open to everybody stop the start."""
    monkeypatch.setenv(f"ANOMALY_{name}", value)
    with pytest.raises(SettingsError, match=f"^ANOMALY_{name}"):
        settings.from_environment()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"MICROBATCH_MAX_DELAY_MS": "2500"},
            "ANOMALY_DEADLINE_MS: must be greater than ANOMALY_MICROBATCH_MAX_DELAY_MS=2500, not 2000",
        ),
        (
            {"MICROBATCH_MAX_DELAY_MS": "700", "DEADLINE_MS": "700"},
            "ANOMALY_DEADLINE_MS: must be greater than ANOMALY_MICROBATCH_MAX_DELAY_MS=700, not 700",
        ),
        (
            {"STORE_TIMEOUT_MS": "3000"},
            "ANOMALY_STORE_TIMEOUT_MS: must be less than ANOMALY_DEADLINE_MS=2000, not 3000",
        ),
        ({"DEADLINE_MS": "500"}, "ANOMALY_STORE_TIMEOUT_MS: must be less than ANOMALY_DEADLINE_MS=500, not 500"),
        ({"DEADLINE_MS": "no", "STORE_TIMEOUT_MS": "3000"}, "ANOMALY_DEADLINE_MS: Input should be a valid number"),
    ],
    ids=["delay", "equal delay", "store", "default of the store", "invalid deadline"],
)
def test_settings_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    """The deadline exceeds the batching delay and the time-out of the store, also if one of them is a default."""
    for name, value in given.items():
        monkeypatch.setenv(f"ANOMALY_{name}", value)
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}"):
        settings.from_environment()


def test_the_deadline_may_be_just_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline above both other times is accepted."""
    for name, value in {"DEADLINE_MS": "501", "MICROBATCH_MAX_DELAY_MS": "500"}.items():
        monkeypatch.setenv(f"ANOMALY_{name}", value)
    assert settings.from_environment().deadline_ms == 501


@pytest.mark.parametrize("prefix", ["", "/anomaly", "/pages", "/of/page"])
def test_other_prefixes_are_taken(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """A prefix is rejected only if its first part is a path of the service itself."""
    monkeypatch.setenv("ANOMALY_ROOT_PATH", prefix)
    assert settings.from_environment().root_path == prefix


async def test_no_path_of_the_service_is_taken_for_a_prefix(client: httpx.AsyncClient) -> None:
    """Each route's first part is one that no prefix may have."""
    paths = (await client.get("/openapi.json")).json()["paths"]
    for path in [*paths, "/docs", "/openapi.json", "/page/page.js"]:
        with pytest.raises(ValidationError):
            Settings(root_path=f"/{path.split('/')[1]}")


def test_settings_cannot_change() -> None:
    """A setting cannot be changed after the start."""
    chosen = Settings()
    with pytest.raises(ValidationError):
        chosen.port = 1  # type: ignore[misc]
