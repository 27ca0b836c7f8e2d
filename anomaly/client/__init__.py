"""The synchronous and the asynchronous client of the service."""
