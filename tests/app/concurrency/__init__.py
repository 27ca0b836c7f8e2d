"""Tests of `app/concurrency`: one file per module."""
