"""The command in this process."""

from tests.cli.conftest import in_process

__all__ = ["in_process"]
