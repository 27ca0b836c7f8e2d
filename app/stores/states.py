"""The table of states in the SQLite file of a store: few small documents that do not expire."""

from __future__ import annotations

import sqlite3

SCHEMA = "CREATE TABLE IF NOT EXISTS states (key TEXT PRIMARY KEY, content BLOB NOT NULL)"
TABLE = "states", "key,content"
"""Name and columns of the table."""


def read(connection: sqlite3.Connection, key: str) -> bytes | None:
    """Return the state under a key; None if there is none."""
    row = connection.execute("SELECT content FROM states WHERE key = ?", (key,)).fetchone()
    return None if row is None else bytes(row[0])


def swap(connection: sqlite3.Connection, key: str, old: bytes | None, new: bytes) -> bool:
    """Replace the state under a key if it still is `old`. A single statement is a transaction."""
    if old is None:
        done = connection.execute("INSERT INTO states (key, content) VALUES (?, ?) ON CONFLICT DO NOTHING", (key, new))
    else:
        done = connection.execute("UPDATE states SET content = ? WHERE key = ? AND content = ?", (new, key, old))
    return done.rowcount == 1
