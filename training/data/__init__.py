"""Loads data sets and splits them."""
