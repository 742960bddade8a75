"""A directory as a remote store. store.py has `make`."""
