"""The training procedures, one per entry of the table."""
