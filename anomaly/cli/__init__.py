"""The command `anomaly`: score files from a shell, against a service or offline. Imports torch only where it scores."""
