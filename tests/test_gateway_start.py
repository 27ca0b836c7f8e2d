"""The gateway's start script, up to the start of HAProxy."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.conftest import ROOT

GATEWAY = ROOT / "deploy" / "gateway"
LIMITS = dict(re.findall(r"\b([A-Z_]+)=(\d+)", (GATEWAY / "Dockerfile").read_text()))


@pytest.mark.parametrize("value", ["-1", "", "many", "1e3", "5 0"])
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_that_is_no_number_stops_the_start(name: str, value: str) -> None:
    """The start script rejects these values, because HAProxy would accept them and reject all requests or none."""
    environment = {**os.environ, **LIMITS, name: value}
    done = subprocess.run(["sh", GATEWAY / "start"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"cannot start: {name} is no number\n")


def test_the_shipped_limits_are_numbers() -> None:
    """With the default limits, the script continues and then fails because the list of keys is missing."""
    done = subprocess.run(
        ["sh", GATEWAY / "start"], env={**os.environ, **LIMITS}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "cannot start: the file of the API keys cannot be read\n")
