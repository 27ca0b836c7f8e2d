"""Tests of `app/models`: one file per module."""
