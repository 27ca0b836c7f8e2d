"""How fast the service is, next to what HTTP itself costs. Never imported by the service; see docs/performance.md."""
