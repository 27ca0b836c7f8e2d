"""Tests mirror the source. Each test's docstring states the tested behaviour."""
