"""Tests of `app/telemetry`: one file per module."""
