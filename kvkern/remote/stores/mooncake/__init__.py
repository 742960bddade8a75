"""Mooncake Store as a remote store. store.py has `make`."""
