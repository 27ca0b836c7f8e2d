"""Turns bytes into requests and responses into bytes. Nothing below this package knows HTTP."""
