"""Mixed load with faults at random on a running service."""
