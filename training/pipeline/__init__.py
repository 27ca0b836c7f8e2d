"""Makes, recalibrates and compares model versions."""
