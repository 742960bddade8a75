"""The daemon's side: sockets, sessions, leases and quotas."""
