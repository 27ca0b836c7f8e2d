"""The Python client, against the service as a process of its own."""
