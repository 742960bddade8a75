"""Moves chunks between a GPU and the arena: measures the link, plans how to move a job, and copies."""
