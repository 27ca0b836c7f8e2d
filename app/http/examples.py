"""Adds examples of successful replies to the OpenAPI document.

`python -m benchmarks.write_openapi_examples` records them from a service with the shipped models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("examples.json")
"""Operation, status, media type, and the body: a document for JSON, else text."""


def add(document: dict[str, Any]) -> dict[str, Any]:
    """Add the recorded examples to an OpenAPI document, and return it."""
    recorded = json.loads(FILE.read_text())
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, contents in recorded.get(operation["operationId"], {}).items():
                for media_type, example in contents.items():
                    operation["responses"][status]["content"][media_type]["example"] = example
    return document
