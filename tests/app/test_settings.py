"""Settings: what the environment may say."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from app import settings
from app.settings import Settings, SettingsError


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable with the prefix sets the field of its name."""
    monkeypatch.setenv("ANOMALY_BATCH_MAX_SIZE", "7")
    assert settings.from_environment({"ANOMALY_BATCH_MAX_SIZE": "7"}).batch_max_size == 7


def test_unknown_names_are_refused() -> None:
    """A misspelt variable stops the start and is named."""
    with pytest.raises(SettingsError, match="ANOMALY_BATCHMAX"):
        settings.from_environment({"ANOMALY_BATCHMAX": "7", "PATH": "/bin"})


def test_bad_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that does not fit stops the start and its variable is named."""
    monkeypatch.setenv("ANOMALY_PORT", "many")
    with pytest.raises(SettingsError, match="ANOMALY_PORT"):
        settings.from_environment({"ANOMALY_PORT": "many"})


def test_settings_cannot_change() -> None:
    """Nobody can change a setting after the start."""
    chosen = Settings()
    with pytest.raises(ValidationError):
        chosen.port = 1  # type: ignore[misc]
