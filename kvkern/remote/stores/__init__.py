"""Clients of the stores that nodes share: files, Redis, Mooncake, object storage. Each knows only keys and bytes."""
