"""Turns bytes into requests and responses into bytes. No package below this one depends on HTTP."""
