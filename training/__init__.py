"""Offline training: from data to a model version in the model store."""
