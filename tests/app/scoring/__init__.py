"""Tests of `app/scoring`: one file per module."""
