"""Calibrates and evaluates a trained network."""
