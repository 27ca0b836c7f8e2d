"""The Python client, with the service in a separate process."""
