"""The command `anomaly`, in a separate process."""
