"""Defects found in another KV cache. Each test proves that kvkern does not have one; the comment above it names the defect."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvkern
from kvkern.api import PagedCache
from kvkern.cache.manager import Cache
from kvkern.errors import LayoutError
from kvkern.kernels.chunk_keys import chunk_keys
from kvkern.policy.lru import LRU
from kvkern.tiers.dram import DramTier
from tests.support import chain_keys, make_arena, put

CHUNK, NUM_BLOCKS = 16, 80
TOKENS = list(range(64))


def engine_tensor() -> torch.Tensor:
    return torch.zeros(2, NUM_BLOCKS, CHUNK, 2, 8, dtype=torch.bfloat16)


def open_cache(tensor: torch.Tensor, folder: Path, slots: int = 16, **options: Any) -> PagedCache:
    layout = kvkern.layout.flash_attention([tensor])
    defaults = {"model": "m", "weights": "w", "arena_dir": folder, "threads": 1}
    return kvkern.open_cache(layout, [tensor], capacity=4096 + slots * 8192, **(defaults | options))


def fill(tensor: torch.Tensor, table: list[int], first: float = 1) -> None:
    """Fill block i of the table with first + i."""
    for i, block in enumerate(table):
        tensor[:, block] = first + i


def values(tensor: torch.Tensor, table: list[int]) -> list[float]:
    for block in table:
        assert len(tensor[:, block].unique()) == 1
    return [float(tensor[0, block, 0, 0, 0]) for block in table]


@pytest.fixture
def tensor() -> torch.Tensor:
    return engine_tensor()


@pytest.fixture
def cache(tensor: torch.Tensor, tmp_path: Path) -> Iterator[PagedCache]:
    with closing(open_cache(tensor, tmp_path)) as cache:
        yield cache


# A batched read only counted its successes, so after a missing middle block every later block took the place before it.
def test_hole(cache: PagedCache, tensor: torch.Tensor) -> None:
    fill(tensor, [0, 1, 2, 3])
    cache.store(TOKENS, [0, 1, 2, 3])
    with cache.match(TOKENS) as hit:
        cache._transfer._arena.mark_bad(np.array([hit.lease.slots[1]]))  # chunk 1 is lost
    with cache.match(TOKENS) as hit:
        assert hit.num_tokens == 16
        assert cache.load(hit, [10, 11, 12, 13]) == 16
    assert values(tensor, [10, 11, 12, 13]) == [1, 0, 0, 0]


# The same for a chunk that fails in the middle of a load: it ends the load, and later chunks do not count as loaded.
def test_hole_found_while_loading(cache: PagedCache, tensor: torch.Tensor) -> None:
    cache.store(TOKENS, [0, 1, 2, 3])
    with cache.match(TOKENS) as hit:
        cache._transfer._arena.parts(0)[hit.lease.slots[2], 0] ^= 1
        assert cache.load(hit, [10, 11, 12, 13]) == 32


# After a timeout a read went on writing into buffers that belonged to other blocks by then.
def test_use_after_timeout(tmp_path: Path, tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held back until its slots belong to another sequence. No byte of that sequence changes."""
    go, entered = threading.Event(), threading.Event()
    with closing(open_cache(tensor, tmp_path, slots=4)) as cache:
        transfer, manager = cache._transfer, cache._cache
        real = transfer._store_piece

        def slow(*args: Any) -> None:
            entered.set()
            go.wait(30)
            real(*args)

        monkeypatch.setattr(transfer, "_store_piece", slow)
        keys = cache.keys(TOKENS)
        late = manager.reserve(keys, keys, cache._shape)
        rows = np.arange(4, dtype=np.int32).reshape(4, 1)
        job = transfer.store([cache._chunk_batch(cache._shape, rows, late.keys, late.slots, late.generations)])
        assert entered.wait(30)
        manager.abort(late)  # what a careless caller does on a timeout
        monkeypatch.undo()
        other_keys = cache.keys([7] * 64)
        new = manager.reserve(other_keys, other_keys, cache._shape)
        assert set(new.slots) == set(late.slots)
        cache._transfer._arena.parts(0)[:] = 0x55
        go.set()
        assert not job.wait().ok.any()
        assert (cache._transfer._arena.parts(0) == 0x55).all()
        assert manager.commit(new) == 0  # WRITTEN of the late generation publishes nothing


# A store over quota was denied, but its memory was not freed: 192 of 256 blocks were lost for ever.
def test_leak_on_denial(tmp_path: Path, tensor: torch.Tensor) -> None:
    with closing(open_cache(tensor, tmp_path, slots=4)) as cache:
        cache.store(TOKENS, [0, 1, 2, 3])
        leases = [cache.match(TOKENS) for _ in range(3)]
        for i in range(50):
            assert cache.store([i] * 64, [0, 1, 2, 3]) == 0
        for lease in leases:
            lease.release()
        cache.clear()
        assert cache.stats()["free_slots"] == 4
        assert cache.store([99] * 64, [0, 1, 2, 3]) == 4


# The ghost queue of evicted keys never shrank: 1,024,000 index entries for 512 resident blocks.
def test_unbounded_ghost(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, slots=64, part_nbytes=64)
    policy = LRU()
    tier = DramTier(arena, policy)
    cache = Cache(tier)
    for i in range(2000):
        assert put(cache, arena, chain_keys(i, 50)) == 50  # 100,000 distinct chunks
    assert cache.counters.evicted_chunks == 100_000 - 64
    assert len(policy) == len(tier._index) == 64
    bounded = (tier._key_of, tier._state, tier._pins, tier._free, tier._doomed, cache.faults._logged)
    assert all(len(structure) <= 64 for structure in bounded)
    arena.close()


# The key did not name the model, so two models of the same shape read each other's KV.
def test_model_identity(tmp_path: Path, tensor: torch.Tensor) -> None:
    identities: list[dict[str, Any]] = [{}, {"model": "other"}, {"weights": "finetuned"}, {"salt": "tenant"}]
    namespaces, seen = set(), set[bytes]()
    for options in identities:
        with closing(open_cache(tensor, tmp_path, **options)) as cache:
            namespaces.add(cache.namespace.root)
            assert set(cache.keys(TOKENS)).isdisjoint(seen)
            seen.update(cache.keys(TOKENS))
    assert len(namespaces) == len(identities)


# The same for equal keys: the header's namespace is compared too, so a slot of another model never reaches a block.
def test_model_identity_of_a_slot(cache: PagedCache, tensor: torch.Tensor) -> None:
    fill(tensor, [0])
    cache.store(TOKENS[:16], [0])
    with cache.match(TOKENS[:16]) as hit:
        cache._transfer._arena.headers["namespace"][list(hit.lease.slots)] = np.void(bytes(32))
        assert cache.load(hit, [10]) == 0
    assert values(tensor, [10]) == [0]


# The key of a view ignored the view's offset: key(view[16:32]) was key(tokens[0:16]).
def test_offset_view_of_tokens() -> None:
    tokens = np.arange(64, dtype=np.uint32)
    root = bytes(32)
    assert (chunk_keys(root, tokens[16:32], 16) != chunk_keys(root, tokens[0:16], 16)).any()
    for view in (tokens[16:48], tokens[::2], tokens[::-1]):
        np.testing.assert_array_equal(chunk_keys(root, view, 16), chunk_keys(root, view.tolist(), 16, backend="ref"))


# The same for tensors: a slice with a storage offset is read and written at its own place.
def test_offset_view_of_tensors(tmp_path: Path) -> None:
    whole = torch.zeros(2, NUM_BLOCKS + 20, CHUNK, 2, 8, dtype=torch.bfloat16)
    view = whole[:, 13 : 13 + NUM_BLOCKS]
    with closing(open_cache(view, tmp_path)) as cache:
        fill(view, [5, 6, 7, 8])
        cache.store(TOKENS, [5, 6, 7, 8])
        with cache.match(TOKENS) as hit:
            assert cache.load(hit, [70, 60, 50, 40]) == 64
        assert values(whole, [83, 73, 63, 53]) == [1, 2, 3, 4]
        assert float(whole.abs().sum()) == 2 * float(whole[:, 18:22].abs().sum())


# Hits and lookups were counted in different units: 1024 hits and -960 misses of 64 tokens.
def test_hit_rate_never_above_one(cache: PagedCache) -> None:
    for length in (16, 64, 33, 64, 64, 15):
        cache.store(TOKENS[:length], [0, 1, 2, 3])
        cache.match(TOKENS[:length]).release()
        stats = cache.stats()
        assert 0 <= stats["hit_chunks"] <= stats["lookup_chunks"]
        assert 0 <= stats["hit_ratio"] <= 1
    assert cache.stats()["hit_chunks"] == 1 + 4 + 2 + 4 + 4


# One tier had an unkeyed 128-bit hash and the other a 32-bit one. Tokens were compared at best, sometimes nothing was.
def test_one_cryptographic_key_a_chunk(cache: PagedCache, tmp_path: Path) -> None:
    keys = cache.keys(TOKENS)
    assert [len(k) for k in keys] == [32] * 4
    arena = make_arena(tmp_path, slots=40, part_nbytes=64)
    manager = Cache(DramTier(arena, LRU()))
    base = bytearray(keys[0])
    for at in range(32):  # keys that differ in any one byte are different chunks
        other = bytearray(base)
        other[at] ^= 1
        assert manager.lookup([bytes(other)]) == 0
        assert put(manager, arena, [bytes(other)]) == 1
    assert manager.lookup([bytes(base)]) == 0
    arena.close()


# A lookup of n blocks hashed n prefixes: 11 s for 128 K tokens. (Times are in bench/cache.py.)
def test_linear_lookup(tmp_path: Path) -> None:
    """A lookup asks the index once per chunk, for sequences of any length."""

    class Counting(dict):  # type: ignore[type-arg]
        asked = 0

        def __contains__(self, key: object) -> bool:
            Counting.asked += 1
            return super().__contains__(key)

    arena = make_arena(tmp_path, slots=800, part_nbytes=64)
    tier = DramTier(arena, LRU())
    tier._index = Counting()
    cache = Cache(tier)
    put(cache, arena, chain_keys("a", 800))
    for chunks in (200, 400, 800):
        Counting.asked = 0
        assert cache.lookup(chain_keys("a", chunks)) == chunks
        assert Counting.asked == chunks
        cache.release(cache.acquire(chain_keys("a", chunks)))
        assert Counting.asked == 2 * chunks
    arena.close()


# With validation on, every block except the first was rejected, because its tokens were read from the wrong place.
def test_validation_accepts_what_was_stored(cache: PagedCache, tensor: torch.Tensor) -> None:
    fill(tensor, list(range(16)))
    tokens = list(range(256))
    assert cache.store(tokens, list(range(16))) == 16
    with cache.match(tokens) as hit:
        assert cache.load(hit, list(range(20, 36))) == 256
    assert values(tensor, list(range(20, 36))) == [float(i + 1) for i in range(16)]
    assert cache.stats()["bad_chunks"] == 0


# A missing `return` raised an exception in a background thread, which ended that thread for ever.
def test_error_instead_of_dead_thread(cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only copy thread meets an unexpected error. That store is a miss, and the next store works."""

    def broken(*args: object) -> None:
        raise AttributeError("an unexpected error")

    with monkeypatch.context() as patch:
        patch.setattr(cache._transfer, "_store_piece", broken)
        assert cache.store(TOKENS, [0, 1, 2, 3]) == 0
    assert cache.stats()["failed_chunks"] == 4
    assert cache.stats()["free_slots"] == cache.stats()["slots"]
    assert cache.store(TOKENS, [0, 1, 2, 3]) == 4
    with monkeypatch.context() as patch:
        patch.setattr(cache._transfer, "_scatter_verified", broken)
        with cache.match(TOKENS) as hit:
            assert cache.load(hit, [10, 11, 12, 13]) == 0
    assert cache.store(TOKENS, [0, 1, 2, 3]) == 4


# The first hit of a block wrote the block to the next tier before it answered, in 340 ms instead of 16.
def test_a_hit_writes_nothing(cache: PagedCache) -> None:
    cache.store(TOKENS, [0, 1, 2, 3])
    before = cache._transfer._arena.bytes.copy()
    with cache.match(TOKENS) as hit:
        cache.load(hit, [10, 11, 12, 13])
    np.testing.assert_array_equal(cache._transfer._arena.bytes, before)


# `flush` waited for a condition that no thread would signal. Here a store ends with its job, also after an error.
def test_no_wait_without_an_end(cache: PagedCache) -> None:
    job = cache._transfer.store(
        [cache._chunk_batch(cache._shape, np.array([[999]], dtype=np.int32), (bytes(32),), (0,), (0,))]
    )
    assert isinstance(job.wait().error, LayoutError)
    assert job.done()
