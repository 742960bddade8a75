"""The engine's and the operator's side of the node's cache: clients of the daemon."""
