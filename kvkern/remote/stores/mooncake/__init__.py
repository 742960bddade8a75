"""Mooncake Store as a remote store. `make` is in store.py."""
