"""Tests of `app/stores`: one file per module."""
