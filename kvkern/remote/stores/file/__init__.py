"""A directory as a remote store. `make` is in store.py."""
