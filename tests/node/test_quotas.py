"""Quotas and shares: a model or tenant above its quota evicts its own chunks, and the others keep theirs."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from kvkern.arena.file import Arena
from kvkern.arena.process_identity import process_start
from kvkern.assemble import build_cache
from kvkern.node.daemon.quotas import Quotas
from kvkern.node.daemon.sessions import Session, Sessions
from kvkern.tiers.base import ChunkShape, Lease
from kvkern.tiers.slot_headers import begin_slots
from tests.node.conftest import ARENA_SLOTS, publish_one_by_one, write_payload
from tests.support import chain_keys, key

ROOTS = {name: key("root", name) for name in ("big", "small", "tenant-a", "tenant-b")}
FIELDS = {
    "big": {"model": "llama-70b"}, "small": {"model": "llama-8b"},
    "tenant-a": {"model": "llama-8b", "salt": "a"}, "tenant-b": {"model": "llama-8b", "salt": "b"},
}  # fmt: skip


class Node:
    """A daemon's state and one engine on it."""

    def __init__(self, arena: Arena, quotas: Quotas) -> None:
        self.arena = arena
        self.sessions = Sessions(build_cache(arena, shares=quotas.shares), arena, quotas=quotas)
        self.sessions.adopt()
        self.session: Session = self.sessions.attach((os.getpid(), process_start(os.getpid())), "engine", writer=True)
        for name, root in ROOTS.items():
            self.sessions.describe(self.session, root, FIELDS[name])

    def store(self, name: str, count: int, start: int = 0) -> None:
        """Store chunks of a sequence one after the other."""
        chain = chain_keys(name, start + count)
        published = publish_one_by_one(self.sessions, self.session, ROOTS[name], chain, start)
        assert published == [True] * count

    def fetch(self, name: str, count: int, pin: bool) -> Lease:
        """Do what the remote tier does with chunks that it has read."""
        chain = chain_keys(name, count)
        granted = self.sessions.cache.grant(count)
        slots, generations = np.array(granted.slots, np.int64), np.array(granted.generations, np.uint64)
        begin_slots(self.arena, slots, generations, chain, ChunkShape(ROOTS[name], 0, 16), chain, (1, 1))
        read = replace(granted, keys=tuple(chain), chain=tuple(chain))
        write_payload(self.arena, read)
        return self.sessions.cache.promote(read, ROOTS[name], None, pin, True)

    def held(self, name: str) -> int:
        """Return how many of the first ARENA_SLOTS chunks of the sequence are cached, from the first on."""
        return self.sessions.cache.lookup(chain_keys(name, ARENA_SLOTS))


def test_limits_by_model_and_tenant() -> None:
    quotas = Quotas(models={"llama-*": 4 << 30, "*-8b": 1 << 30}, tenant=1 << 20)
    assert [quotas.limit_nbytes(FIELDS[name]) for name in FIELDS] == [4 << 30, 1 << 30, 1 << 20, 1 << 20]
    assert quotas.limit_nbytes({"model": "qwen"}) is None
    assert (Quotas().shares, Quotas(fair=True).shares, quotas.shares) == (False, True, True)


def test_a_tenant_stays_within_its_quota_and_evicts_its_own_tail(arena: Arena) -> None:
    node = Node(arena, Quotas(tenant=4 * arena.spec.geometry.slot_nbytes))
    node.store("tenant-a", 3)
    node.store("tenant-b", 10)
    node.store("small", 12)
    assert (node.held("tenant-a"), node.held("tenant-b"), node.held("small")) == (3, 4, 12)
    assert node.sessions.cache.counters.evicted_chunks == 6


def test_what_a_remote_store_gives_counts_too(arena: Arena) -> None:
    """While a lease reads it, it stays. Then its tail is evicted."""
    node = Node(arena, Quotas(tenant=4 * arena.spec.geometry.slot_nbytes))
    node.store("small", 12)
    node.fetch("tenant-b", 7, pin=False)
    lease = node.fetch("tenant-a", 10, pin=True)
    node.fetch("big", 2, pin=False)
    for _ in range(3):
        node.sessions.sweep()
    assert [node.held(name) for name in ("tenant-a", "tenant-b", "small", "big")] == [10, 4, 12, 2]
    node.sessions.cache.release(lease)
    node.sessions.sweep()
    assert [node.held(name) for name in ("tenant-a", "tenant-b", "small", "big")] == [4, 4, 12, 2]
    assert not node.sessions.cache.take_grown_namespaces()
    node.fetch("tenant-b", 7, pin=False)
    node.store("tenant-b", 1, start=9)
    assert node.held("tenant-b") <= 4


def test_a_full_arena_takes_from_the_largest(arena: Arena) -> None:
    node = Node(arena, Quotas(fair=True))
    node.store("small", 6)
    node.store("big", 60)
    assert node.held("small") == 6
    node.store("tenant-a", 8)
    assert (node.held("small"), node.held("tenant-a")) == (6, 8)


def test_without_shares_the_oldest_go_first(arena: Arena) -> None:
    node = Node(arena, Quotas())
    node.store("small", 6)
    node.store("big", 60)
    assert node.held("small") == 0
