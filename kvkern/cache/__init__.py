"""The cache over the tiers: lookup, leases, stores. The one place where a fault becomes a miss."""
