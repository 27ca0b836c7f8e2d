"""Writes the files of a model version's report."""
