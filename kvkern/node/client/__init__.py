"""The engine's and the operator's side of the node's daemon."""
