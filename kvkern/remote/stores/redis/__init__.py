"""Redis and Valkey, one server or a cluster, as a remote store. store.py has `make`."""
