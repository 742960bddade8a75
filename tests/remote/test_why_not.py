"""Why a request does not get what it looked up: each chunk has one reason, and counts once however often its request asks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvkern.metrics import Unobserved
from kvkern.remote import cost_model
from tests.node.conftest import GEOMETRY, eventually
from tests.remote.nodes import USE, A, B, Node, node, nodes
from tests.remote.stores.memory import MemoryStore
from tests.support import SHAPE


class Reasons(Unobserved):
    """Counts reasons, and what was looked up and found by tier."""

    def __init__(self) -> None:
        self.chunks: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def not_loaded(self, reason: str, request: int, chunks: int) -> None:
        self.chunks[reason] += chunks

    def looked_up(self, tier: str, namespace: bytes, client: int, chunks: int, hits: int, tokens: bool = True) -> None:
        self.seen[f"{tier} lookup"] += chunks
        self.seen[f"{tier} hit"] += hits


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long waits, however little time the machine gives these threads."""
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 30.0)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 30.0)


def asked(one: Node, times: int = 1) -> Reasons:
    """Ask for twelve chunks so often as one request. Return what the observer was told."""
    one.cache.observer = reasons = Reasons()
    for _ in range(times):
        one.cache.release(one.cache.acquire(A + B, use=replace(USE, request=7)))
        eventually(lambda: not one.tier.reader.num_waiting)
    return reasons


def test_chunks_that_no_tier_has(tmp_path: Path) -> None:
    store = MemoryStore()
    with nodes(tmp_path, store) as (one, two):
        one.compute(A)
        one.settle()
        reasons = asked(two, times=3)
        two.settle()
    assert +reasons.chunks == {"not_found": 6}
    assert +reasons.seen == {"dram lookup": 12, "remote lookup": 12, "remote hit": 6}


def test_a_store_that_fails(tmp_path: Path) -> None:
    store = MemoryStore()
    with node(tmp_path, store) as one:
        store.broken = True
        assert +asked(one).chunks == {"store_failed": 12}
        one.tier.breaker.trip("broken on purpose")
        assert +asked_anew(one).chunks == {"store_failed": 12}


def asked_anew(one: Node) -> Reasons:
    one.cache.observer = reasons = Reasons()
    one.cache.release(one.cache.acquire(A + B, use=replace(USE, request=8)))
    return reasons


def test_chunks_that_computing_beats(tmp_path: Path) -> None:
    store = MemoryStore()
    with nodes(tmp_path, store) as (one, two):
        one.compute(A + B)
        one.settle()
        two.tier.outbox.chunk_tokens = SHAPE.chunk_tokens
        two.tier.costs.note_ask(1e-6)
        two.tier.costs.note_read(1, 10.0)
        two.cache.note_prefill(SHAPE.chunk_tokens / 1.0)  # a second for a chunk
        assert +asked(two).chunks == {"gated": 12}


def test_a_store_that_is_slow_to_answer(tmp_path: Path) -> None:
    store = MemoryStore()
    with node(tmp_path, store) as one:
        one.tier.outbox.chunk_tokens = SHAPE.chunk_tokens
        one.tier.costs.note_ask(100.0)
        one.cache.note_prefill(SHAPE.chunk_tokens / 1.0)
        assert +asked(one).chunks == {"unasked": 12}


def test_chunks_that_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 0.05)
    store = MemoryStore()
    with nodes(tmp_path, store) as (one, two):
        one.compute(A + B)
        one.settle()
        two.store.delay_s = 0.3
        assert +asked(two).chunks == {"late": 12}
        two.settle()


def test_spoiled_values(tmp_path: Path) -> None:
    store = MemoryStore()
    with nodes(tmp_path, store) as (one, two):
        one.compute(A + B)
        one.settle()
        value = bytearray(store.values[A[2]])
        value[GEOMETRY.header_nbytes] ^= 1
        store.values[A[2]] = bytes(value)
        reasons = asked(two)
        two.settle()
    assert +reasons.chunks == {"failed_verification": 10}


def test_without_a_store(tmp_path: Path) -> None:
    store = MemoryStore()
    with node(tmp_path, store) as one:
        one.cache._remote = None
        one.compute(A)
        assert +asked(one, times=2).chunks == {"not_found": 6}
        one.cache._remote = one.tier
