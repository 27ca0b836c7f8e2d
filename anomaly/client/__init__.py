"""Sends requests to the service: the synchronous and the asynchronous client."""
