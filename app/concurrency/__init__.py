"""Threads, queues and timers without domain knowledge."""
