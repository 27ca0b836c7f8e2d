"""The version of the service. Containers have no package metadata, so it is a constant; a test compares both."""

from __future__ import annotations

VERSION = "0.1.0"
