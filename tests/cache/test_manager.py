"""The manager: counting, faults that become misses, overload, and many threads."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkern.arena.file import Arena
from kvkern.arena.slots import SlotState
from kvkern.cache.manager import Cache
from kvkern.errors import ConfigError
from kvkern.policy.base import Keys, Stop, Use
from kvkern.policy.lru import LRU
from kvkern.tiers.dram import DramTier
from tests.support import NAMESPACE, SHAPE, chain_keys, make_arena, put, run_in_threads, write


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = make_arena(tmp_path, slots=8)
    yield arena
    arena.close()


@pytest.fixture
def cache(arena: Arena) -> Cache:
    return Cache(DramTier(arena, LRU()))


def test_a_lookup_pins_and_counts_nothing(cache: Cache, arena: Arena) -> None:
    put(cache, arena, chain_keys("a", 4))
    assert cache.lookup(chain_keys("a", 6)) == 4
    assert cache.lookup([]) == 0
    assert cache.counters.lookup_chunks == 0
    assert put(cache, arena, chain_keys("b", 8)) == 8  # all of a could go


def test_counters(cache: Cache, arena: Arena) -> None:
    put(cache, arena, chain_keys("a", 4))
    lease = cache.acquire(chain_keys("a", 6))
    x = chain_keys("x", 6)
    reservation = cache.reserve(x, x, SHAPE)
    write(arena, reservation)
    arena.headers["written"][reservation.slots[3], 0] = 0
    assert cache.commit(reservation) == 3
    arena.mark_bad(np.array(lease.slots[:1]))
    assert cache.release(lease) == 1
    put(cache, arena, chain_keys("y", 6))
    assert cache.clear() == 8
    got = cache.counters.snapshot()
    assert {name: value for name, value in got.items() if not name.startswith("remote_")} == {
        "lookup_chunks": 6, "hit_chunks": 4, "hit_ratio": 4 / 6, "stored_chunks": 4 + 3 + 6, "failed_chunks": 1,
        "duplicate_chunks": 0, "dropped_chunks": 2, "declined_chunks": 0, "evicted_chunks": 4, "trimmed_chunks": 0,
        "bad_chunks": 1, "cleared_chunks": 8, "faults": 0,
    }  # fmt: skip
    assert cache.usage() == {"slots": 8, "free_slots": 8}


def test_the_hit_ratio_of_nothing_is_zero(cache: Cache) -> None:
    assert cache.counters.snapshot()["hit_ratio"] == 0
    cache.release(cache.acquire([]))
    assert cache.counters.hit_ratio == 0


def test_bad_chunks_are_logged_once_a_release(cache: Cache, arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    put(cache, arena, chain_keys("a", 4))
    lease = cache.acquire(chain_keys("a", 4))
    arena.mark_bad(np.array(lease.slots))
    with caplog.at_level(logging.WARNING, logger="kvkern"):
        assert cache.release(lease) == 4
    assert [r.getMessage() for r in caplog.records] == [
        "kvkern: 4 chunk(s) failed verification and are dropped: 4 with other bytes than were stored. If it happens again, "
        "check the host's memory, and who may use this cache"
    ]
    assert cache.lookup(chain_keys("a", 4)) == 0
    assert cache.usage()["free_slots"] == 8


CALLS = {
    "contains": lambda cache: cache.lookup(chain_keys("a", 2)),
    "acquire": lambda cache: cache.acquire(chain_keys("a", 2)).slots,
    "release": lambda cache: cache.release(cache.acquire([])),
    "touch": lambda cache: cache.touch(chain_keys("a", 2)),
    "reserve": lambda cache: cache.reserve(chain_keys("b", 2), chain_keys("b", 2), SHAPE).slots,
    "commit": lambda cache: cache.commit(cache.reserve([], [], SHAPE)),
    "abort": lambda cache: cache.abort(cache.reserve([], [], SHAPE)),
    "clear": lambda cache: cache.clear(),
}


@pytest.mark.parametrize("method", CALLS)
def test_a_fault_is_a_miss(
    method: str, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failure rule 1: every fault is counted, each kind is logged once, and the lock is free again."""

    def broken(self: DramTier, *args: object) -> None:
        raise OSError("bus error, or what a broken disk says")

    monkeypatch.setattr(DramTier, method, broken)
    with caplog.at_level(logging.ERROR, logger="kvkern"):
        for _ in range(3):
            assert CALLS[method](cache) in (0, (), None)
    assert cache.counters.faults == 3
    assert len(caplog.records) == 1
    monkeypatch.undo()
    assert CALLS[method](cache) is not ...


def test_bad_input_is_the_callers_to_see(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: DramTier, keys: object) -> int:
        raise ConfigError("no such thing")

    monkeypatch.setattr(DramTier, "contains", refuse)
    with pytest.raises(ConfigError):
        cache.lookup([])
    assert cache.counters.faults == 0


def test_overload_never_drops_a_store_while_anything_unleased_can_go(cache: Cache, arena: Arena) -> None:
    """A thousand distinct sequences go through eight slots. Three of the slots are leased throughout."""
    put(cache, arena, chain_keys("kept", 3))
    lease = cache.acquire(chain_keys("kept", 3))
    for i in range(1000):
        assert put(cache, arena, chain_keys(i, 1 + i % 5)) == 1 + i % 5
    assert cache.counters.dropped_chunks == 0
    assert cache.lookup(chain_keys("kept", 3)) == 3
    cache.release(lease)


def test_two_stores_at_once_can_starve_only_each_other(cache: Cache, arena: Arena) -> None:
    """Chunks that are being written cannot be evicted: the second store gets the other slots."""
    a, b = chain_keys("a", 6), chain_keys("b", 6)
    first, second = cache.reserve(a, a, SHAPE), cache.reserve(b, b, SHAPE)
    assert (len(first.slots), len(second.slots), second.dropped) == (6, 2, 4)
    for reservation in (first, second):
        write(arena, reservation)
        cache.commit(reservation)
    assert cache.lookup(a) == 6
    assert cache.lookup(b) == 2


def test_release_is_linear_after_a_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release builds a fixed number of sets, not one per chunk. The test counts sets instead of seconds."""
    from kvkern.tiers import dram

    made = []

    class Counting(set):  # type: ignore[type-arg]
        def __init__(self, *args: object) -> None:
            made.append(1)
            super().__init__(*args)  # type: ignore[arg-type]

    arena = make_arena(tmp_path, slots=200, part_nbytes=64)
    cache = Cache(DramTier(arena, LRU()))
    put(cache, arena, chain_keys("a", 200))
    lease = cache.acquire(chain_keys("a", 200))
    cache.clear()
    monkeypatch.setattr(dram, "set", Counting, raising=False)
    cache.release(lease)
    assert cache.usage()["free_slots"] == 200
    assert len(made) <= 2
    arena.close()


def test_threads(tmp_path: Path) -> None:
    """Eight threads store, read, clear and spoil. A slot's payload is its key, so the test sees a mixed-up slot."""
    arena = make_arena(tmp_path, slots=32, part_nbytes=64)
    cache = Cache(DramTier(arena, LRU()))
    parts = arena.parts(0)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for step in range(300):
            chain = chain_keys(rng.randrange(6), rng.randrange(1, 10))
            if rng.random() < 0.5:
                reservation = cache.reserve(chain, chain, SHAPE)
                for slot, k in zip(reservation.slots, reservation.keys, strict=True):
                    parts[slot, :32] = np.frombuffer(k, dtype=np.uint8)
                if rng.random() < 0.1:
                    cache.abort(reservation)
                else:
                    write(arena, reservation)
                    cache.commit(reservation)
            else:
                lease = cache.acquire(chain)
                for slot, k in zip(lease.slots, lease.keys, strict=True):
                    if parts[slot, :32].tobytes() != k or bytes(arena.headers["key"][slot]) != k:
                        wrong.append((seed, step, slot))
                if lease.slots and rng.random() < 0.05:
                    arena.mark_bad(np.array(lease.slots[-1:]))
                cache.release(lease)
            if rng.random() < 0.01:
                cache.clear()

    run_in_threads(work, 8)
    assert wrong == []
    assert cache.counters.faults == 0
    assert cache.counters.hit_chunks > 0
    cache.clear()
    assert cache.usage() == {"slots": 32, "free_slots": 32}
    assert (arena.headers["state"] == SlotState.FREE).all()
    arena.close()


def test_the_policy_learns_of_requests_by_the_clock_of_the_cache(arena: Arena) -> None:
    class Noting(LRU):
        def access(self, chain: Keys, use: Use) -> None:
            told.append((list(chain), use))
            super().access(chain, use)

    told: list[tuple[list[bytes], Use]] = []
    times = iter([1.0, 2.0, 3.0, 4.0])
    cache = Cache(DramTier(arena, Noting()), clock=lambda: next(times))
    chain, use = chain_keys("a", 10), Use(now_s=99.0, request=7)
    cache.release(cache.acquire(chain[:2], use=use))
    reservation = cache.reserve(chain, chain, SHAPE, use=use)
    assert (len(reservation.slots), reservation.declined, reservation.dropped) == (8, 0, 2)
    write(arena, reservation)
    cache.commit(reservation)
    cache.finish(Use(request=7, output_tokens=3, stop=Stop.TOOL_CALL))
    assert cache.acquire_soon(chain[:2]).result().keys == tuple(chain[:2])
    assert told == [
        (chain[:2], Use(now_s=1.0, request=7)),
        (chain, Use(now_s=2.0, request=7, namespace=NAMESPACE)),
        ([], Use(now_s=3.0, request=7, output_tokens=3, stop=Stop.TOOL_CALL)),
        (chain[:2], Use(now_s=4.0)),
    ]


def test_declined_chunks_are_counted(cache: Cache, arena: Arena) -> None:
    put(cache, arena, chain_keys("a", 8))
    assert put(cache, arena, chain_keys("a", 10)) == 0  # all room is this sequence's own
    assert (cache.counters.declined_chunks, cache.counters.dropped_chunks) == (2, 0)
    assert cache.counters.evicted_chunks == 0


def test_a_request_that_asks_again_counts_once(cache: Cache, arena: Arena) -> None:
    """vLLM asks for a waiting request again and again. What it asks for the first time counts, hit or not."""
    chain, other = chain_keys("a", 6), chain_keys("b", 2)
    put(cache, arena, chain[:4])
    for _ in range(20):
        cache.release(cache.acquire(chain[:3], use=Use(request=7)))
        cache.release(cache.acquire(other, use=Use(request=7), prefix=False))
    assert (cache.counters.lookup_chunks, cache.counters.hit_chunks) == (5, 3)
    for _ in range(2):
        cache.release(cache.acquire(chain, use=Use(request=7)))  # it has grown
    assert (cache.counters.lookup_chunks, cache.counters.hit_chunks) == (8, 4)
    for request in (8, 0, 0):
        cache.release(cache.acquire(chain[:3], use=Use(request=request)))
    assert (cache.counters.lookup_chunks, cache.counters.hit_chunks) == (17, 13)
    cache.release(cache.acquire(chain, use=Use(request=9, counts_itself=True)))
    cache.count_lookups(6, 1)
    assert (cache.counters.lookup_chunks, cache.counters.hit_chunks) == (23, 14)
