"""Reads, prepares and draws images."""
