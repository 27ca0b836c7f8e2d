"""Tests without labels whether today's normal images still score like the calibration images."""
