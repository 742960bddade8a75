"""Eviction policies: one file each, behind the protocol in base.py. No I/O, no tensors, deterministic given the trace."""
