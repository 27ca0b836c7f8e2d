"""Declares the routes, grouped as in the API reference."""
