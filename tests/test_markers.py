"""The marker `process` is complete: tests without it cannot start a process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess

import pytest


def test_an_unmarked_test_cannot_start_a_process() -> None:
    """Every way to start a process raises an error that names the test."""
    name = "test_an_unmarked_test_cannot_start_a_process starts a process"
    with pytest.raises(AssertionError, match=name):
        subprocess.run(["true"], check=True)
    with pytest.raises(AssertionError, match=name):
        multiprocessing.get_context("spawn").Process(target=print).start()
    with pytest.raises(AssertionError, match=name):
        os.fork()


@pytest.mark.process
def test_a_marked_test_can_start_a_process() -> None:
    """The marker lifts the restriction."""
    assert subprocess.run(["true"], check=True).returncode == 0
