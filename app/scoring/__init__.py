"""Scores images: one use case per route, one verdict for all of them."""
