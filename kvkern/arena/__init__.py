"""One file of slots in shared memory: its format, its mapping, and who has it. Knows bytes; no tensors, no index."""
