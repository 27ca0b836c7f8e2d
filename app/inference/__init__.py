"""Holds model versions in memory and runs their forward passes."""
