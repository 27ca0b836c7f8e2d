"""Calibration and evaluation of an exported model."""
