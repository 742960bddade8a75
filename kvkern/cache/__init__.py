"""The cache over the tiers: what is cached, read and written. The one place where a fault becomes a miss."""
