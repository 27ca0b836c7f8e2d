"""The page and what it loads."""
