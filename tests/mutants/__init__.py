"""Mutation testing of the modules whose faults would give wrong scores or let strangers in."""
