"""Adds examples of successful replies to the OpenAPI document.

`python -m benchmarks.write_openapi_examples` records them from a service with the shipped models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI

FILE = Path(__file__).with_name("examples.json")
"""Operation, status, media type, and the body: a document for JSON, else text."""


class Api(FastAPI):
    """A framework application whose OpenAPI document contains the recorded examples."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document. It is built once."""
        if self.openapi_schema is None:
            self.openapi_schema = _add(super().openapi())
        return self.openapi_schema


def _add(document: dict[str, Any]) -> dict[str, Any]:
    recorded = json.loads(FILE.read_text())
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, contents in recorded.get(operation["operationId"], {}).items():
                for media_type, example in contents.items():
                    operation["responses"][status]["content"][media_type]["example"] = example
    return document
