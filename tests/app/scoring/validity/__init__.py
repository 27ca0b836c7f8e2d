"""Tests of the validity monitor."""
