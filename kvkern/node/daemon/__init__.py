"""The daemon's side of the node's cache: socket, connections, sessions, leases and quotas."""
