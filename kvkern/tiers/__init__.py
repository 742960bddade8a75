"""The tiers chunks live in. Each answers for whole batches of keys, in prefix order, and says how far it got."""
