"""Clients of the stores that nodes share: files, Redis, Mooncake, object storage. Each knows keys and bytes only."""
