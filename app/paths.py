"""The paths of the service, for the modules that must tell them from others: settings and API keys."""

from __future__ import annotations

PUBLIC = frozenset(("/", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json"))
"""Paths that need no API key: probes, metrics, and the files that a browser loads before it can send a key."""
PUBLIC_FOLDERS = ("/page/",)
"""Prefixes of further paths that need no API key."""
PROTECTED = frozenset(("/score", "/reconstruction", "/models"))
"""Paths, and prefixes of paths, that need an API key if the operator has set a file of API keys."""
FIRST_SEGMENTS = frozenset(path.split("/")[1] for path in (*PUBLIC, *PUBLIC_FOLDERS, *PROTECTED)) - {""}
"""First segments of all paths of the service."""
