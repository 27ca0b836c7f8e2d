"""Tests of `app/scoring/review`: one file per module."""
