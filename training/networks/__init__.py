"""Autoencoders and what turns their output into a score."""
