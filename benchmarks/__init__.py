"""Measurements, and the scripts that write their figures into the docs."""
