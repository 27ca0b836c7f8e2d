"""The shipped monitoring, in a real Prometheus."""
