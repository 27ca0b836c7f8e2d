"""Exports a model version and writes it to a model store."""
