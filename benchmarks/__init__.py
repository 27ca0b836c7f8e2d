"""Measure the speed of the service, compared with the cost of HTTP itself.

The service does not import this package; see docs/performance.md.
"""
