"""The command `anomaly`, as a process of its own."""
