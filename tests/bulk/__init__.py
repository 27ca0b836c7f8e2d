"""Bulk scoring, in the process and on a Ray cluster."""
