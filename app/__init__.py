"""The REST inference service."""

__version__ = "0.1.0"
"""A constant, because containers have no package metadata. A test compares it with pyproject.toml."""
