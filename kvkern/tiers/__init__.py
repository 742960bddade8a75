"""The tiers that hold chunks. Each takes whole batches of keys, in prefix order, and reports how far it got."""
