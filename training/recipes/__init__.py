"""The recipes: the ways to fit a scoring module to normal images."""
