"""Coverage-guided fuzzing of all readers of client input."""
