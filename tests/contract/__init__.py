"""Schemathesis against the OpenAPI document of a running service."""
