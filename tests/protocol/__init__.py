"""The inference protocol, spoken by the unmodified clients of others."""
