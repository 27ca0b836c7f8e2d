"""The command `anomaly`. Imports the service's code, and torch with it, only for offline scoring and for training."""
