"""Tests of `app/images`: one file per module."""
