"""The shipped stack on a real Docker engine: `make test-containers`."""
