"""One file of slots in shared memory: its format, its mapping, and its processes. Knows bytes; no tensors, no index."""
