"""Tests of `app/inference`: one file per module."""
