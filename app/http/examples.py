"""Adds examples of successful replies to the OpenAPI document.

`python -m benchmarks.write_openapi_examples` records them from a service with the shipped models.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI

FILE = Path(__file__).with_name("examples.json")
"""Operation, status, media type, and the body: a document for JSON, else text."""


class Api(FastAPI):
    """A framework application whose OpenAPI document contains the recorded examples."""

    _building = threading.Lock()

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document. It is built once; other threads wait until it is complete."""
        with self._building:
            if self.openapi_schema is None:
                _add(super().openapi())
            assert self.openapi_schema is not None
            return self.openapi_schema


def _add(document: dict[str, Any]) -> None:
    recorded = json.loads(FILE.read_text())
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, contents in recorded.get(operation["operationId"], {}).items():
                for media_type, example in contents.items():
                    operation["responses"][status]["content"][media_type]["example"] = example
