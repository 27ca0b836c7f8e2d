"""Mutation testing of the modules whose faults would cause wrong scores or unauthorised access."""
