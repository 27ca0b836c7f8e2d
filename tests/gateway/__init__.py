"""Tests of the service behind its gateway, HAProxy, which they start with the shipped configuration."""
