"""Coverage-guided fuzzing of everything that reads what a client sends."""
