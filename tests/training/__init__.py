"""Tests mirror the source. Each test's docstring is its claim."""
