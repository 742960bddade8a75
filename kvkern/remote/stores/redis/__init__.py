"""Redis and Valkey, one server or a cluster, as a remote store. `make` is in store.py."""
