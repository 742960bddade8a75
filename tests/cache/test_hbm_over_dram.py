"""HBM above DRAM through the public API, on CPU tensors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import kvkern
from kvkern.api import PagedCache
from kvkern.cache.hbm_over_dram import HbmCache
from kvkern.errors import ConfigError, KvkernError
from tests.support import SHAPE, chain_keys, guarded

NUM_BLOCKS, BLOCK_TOKENS, PER_CHUNK = 64, 4, 2
CHUNK = BLOCK_TOKENS * PER_CHUNK
PART_NBYTES, SLOT_NBYTES = 4096, 8192


def make_tensors() -> list[torch.Tensor]:
    shape = (2, NUM_BLOCKS, BLOCK_TOKENS, 2, 16)
    return [guarded(2 * NUM_BLOCKS * 256, i)[0].view(torch.bfloat16).view(shape) for i in range(2)]


def open_cache(tensors: list[torch.Tensor], folder: Path, hbm: int = 8, dram: int = 16, **options: Any) -> PagedCache:
    """Open a cache with `hbm` and `dram` slots."""
    defaults = {
        "model": "m", "weights": "w", "blocks_per_chunk": PER_CHUNK, "capacity": 4096 + dram * SLOT_NBYTES,
        "hbm": hbm * PART_NBYTES, "arena_dir": folder, "threads": 1,
    }  # fmt: skip
    return kvkern.open_cache(kvkern.layout.flash_attention(tensors), tensors, **(defaults | options))


def tokens(name: int, chunks: int) -> list[int]:
    return list(range(1000 * name, 1000 * name + chunks * CHUNK))


def table(first: int, chunks: int) -> list[int]:
    return list(range(first, first + chunks * PER_CHUNK))


def payload(tensors: list[torch.Tensor], blocks: list[int]) -> list[npt.NDArray[np.uint8]]:
    return [t[:, blocks].contiguous().view(torch.uint8).numpy().copy() for t in tensors]


def settled(cache: PagedCache) -> dict[str, int | float]:
    assert isinstance(cache._cache, HbmCache)
    cache._cache.wait_for_moves()
    return cache.stats()


def loads(cache: PagedCache, tensors: list[torch.Tensor], name: int, first: int, chunks: int) -> int:
    """Load a sequence into the last blocks and compare with its own blocks. Returns the number of loaded chunks."""
    elsewhere = table(NUM_BLOCKS - chunks * PER_CHUNK, chunks)
    for t in tensors:
        t[:, elsewhere] = 0
    with cache.match(tokens(name, chunks)) as hit:
        good = cache.load(hit, elsewhere) // CHUNK
    want, got = payload(tensors, table(first, good)), payload(tensors, elsewhere[: good * PER_CHUNK])
    assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))
    return good


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return make_tensors()


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "arc", "lirs", "grit"])
def test_stored_in_hbm_spilled_to_dram_loaded_from_either(
    tensors: list[torch.Tensor], tmp_path: Path, policy: str
) -> None:
    with closing(open_cache(tensors, tmp_path, policy=policy)) as cache:
        assert cache.store(tokens(1, 6), table(0, 6)) == 6
        stats = settled(cache)
        assert (stats["hbm_slots"], stats["hbm_free_slots"], stats["free_slots"]) == (8, 2, 16)
        assert (stats["hbm_stored_chunks"], stats["stored_chunks"], stats["hbm_spilled_chunks"]) == (6, 6, 0)
        assert loads(cache, tensors, 1, 0, 6) == 6
        assert cache.stats()["hbm_hit_chunks"] == 6

        assert (
            cache.store(tokens(2, 5), table(12, 5)) == 5
        )  # 2 fit, 3 go to DRAM at once, and one is spilled to free a slot
        stats = settled(cache)
        assert (stats["hbm_free_slots"], stats["hbm_stored_chunks"], stats["stored_chunks"]) == (1, 8, 11)
        assert (stats["hbm_spilled_chunks"], stats["hbm_lost_chunks"], stats["free_slots"]) == (1, 0, 12)
        assert loads(cache, tensors, 1, 0, 6) == 6  # five from HBM, its tail from DRAM
        assert loads(cache, tensors, 2, 12, 5) == 5
        stats = settled(cache)
        assert stats["hit_chunks"] == stats["lookup_chunks"] == 17
        assert stats["hit_ratio"] == 1.0
        assert stats["bad_chunks"] == stats["faults"] == 0


def test_all_of_it_survives_many_spills_and_promotions(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    """Ten sequences go through an HBM of four slots. All come back whole, in any order."""
    with closing(open_cache(tensors, tmp_path, hbm=4, dram=40, policy="lru")) as cache:
        for name in range(10):
            assert cache.store(tokens(name, 3), table(name * 5, 3)) == 3
            settled(cache)
        for name in (0, 9, 4, 4, 2, 0, 7):
            assert loads(cache, tensors, name, name * 5, 3) == 3
            stats = settled(cache)
            assert stats["hbm_free_slots"] >= 1
        assert stats["hbm_promoted_chunks"] > 0
        assert stats["hbm_lost_chunks"] == stats["bad_chunks"] == stats["faults"] == 0
        assert cache.store(tokens(4, 3), table(20, 3)) == 0  # there already, wherever


def test_used_again_is_promoted(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    with closing(open_cache(tensors, tmp_path, hbm=8, dram=40, policy="lru")) as cache:
        for name in range(4):
            cache.store(tokens(name, 5), table(name * 10, 5))
            settled(cache)
        before = settled(cache)
        assert loads(cache, tensors, 0, 0, 5) == 5
        settled(cache)
        assert loads(cache, tensors, 0, 0, 5) == 5
        after = settled(cache)
        assert after["hbm_promoted_chunks"] > before["hbm_promoted_chunks"]
        assert after["hbm_hit_chunks"] > before["hbm_hit_chunks"]


@pytest.mark.parametrize("where", ["hbm", "dram", "spilled"])
def test_spoiled_bytes_are_a_miss(tensors: list[torch.Tensor], tmp_path: Path, where: str) -> None:
    """In either tier, and also if the bytes were spoiled before the spill: a spill seals the checksum and sums nothing."""
    with closing(open_cache(tensors, tmp_path, hbm=8, dram=40, policy="lru")) as cache:
        both: Any = cache._cache
        both._queue_for_promotion = lambda keys: None  # else a spoiled chunk could be promoted before it is read
        cache.store(tokens(1, 6), table(0, 6))
        if where == "dram":
            both._spill(8)
        lease = cache.match(tokens(1, 6))
        slot = lease.lease.slots[2]
        assert (slot >= both.first_slot) == (where != "dram")
        rows = both._hbm_slots.parts(0) if where != "dram" else both._dram_slots.parts(0)
        rows[slot - both.first_slot * (where != "dram"), 5] ^= 1
        lease.release()
        if where == "spilled":
            assert both._spill(8)
        assert loads(cache, tensors, 1, 0, 6) == 2
        settled(cache)
        assert cache.stats()["bad_chunks"] == 1
        assert cache.match(tokens(1, 6)).num_tokens == 2 * CHUNK
        assert cache.store(tokens(1, 6), table(0, 6)) == 1
        assert loads(cache, tensors, 1, 0, 6) == 6


def test_clear_forgets_both(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    with closing(open_cache(tensors, tmp_path, policy="lru")) as cache:
        cache.store(tokens(1, 6), table(0, 6))
        cache.store(tokens(2, 6), table(12, 6))
        settled(cache)
        assert cache.clear() == 12
        stats = settled(cache)
        assert (stats["hbm_free_slots"], stats["free_slots"]) == (8, 16)
        assert cache.match(tokens(1, 6)).num_tokens == 0


def test_abort_frees_slots_of_both(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    with closing(open_cache(tensors, tmp_path, policy="lru")) as cache:
        assert isinstance(cache._cache, HbmCache)
        chain = chain_keys("a", 11)
        reservation = cache._cache.reserve(chain, chain, SHAPE)
        assert len(reservation.slots) == 11
        stats = cache.stats()
        assert (stats["hbm_free_slots"], stats["free_slots"]) == (0, 13)
        cache._cache.abort(reservation)
        stats = settled(cache)
        assert (stats["hbm_free_slots"], stats["free_slots"]) == (8, 16)
        assert cache._cache.lookup(chain) == 0


def test_leased_chunks_stay(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    """No leased chunk can be spilled: stores go to DRAM, and the leased chunks can be loaded."""
    with closing(open_cache(tensors, tmp_path, hbm=4, dram=16, policy="lru")) as cache:
        cache.store(tokens(1, 3), table(0, 3))
        with cache.match(tokens(1, 3)) as hit:
            assert cache.store(tokens(2, 5), table(6, 5)) == 5
            settled(cache)
            assert cache.load(hit, table(40, 3)) == 3 * CHUNK
        assert loads(cache, tensors, 2, 6, 5) == 5


def test_threads_store_and_load_at_once(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    with closing(open_cache(tensors, tmp_path, hbm=6, dram=60, policy="lru")) as cache:

        def work(name: int) -> None:
            for _ in range(30):
                cache.store(tokens(name, 3), table(name * 6, 3))
                with cache.match(tokens(name, 3)) as hit:
                    elsewhere = table(30 + name * 6, 3)
                    assert cache.load(hit, elsewhere) == 3 * CHUNK
                a, b = payload(tensors, table(name * 6, 3)), payload(tensors, elsewhere)
                assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, name) for name in range(4)]:
                done.result()
        stats = settled(cache)
        assert stats["bad_chunks"] == stats["faults"] == stats["failed_chunks"] == 0


@pytest.mark.parametrize(("options", "error", "says"), [
    ({"hbm": PART_NBYTES - 1}, ConfigError, "hbm 3.999 KiB holds no chunk: one takes 4 KiB"),
    ({"hbm": "none"}, ConfigError, "hbm is 'none'"),
    ({"hbm_nbytes": 1}, ConfigError, "unknown key 'hbm_nbytes'"),
    ({"capacity": None, "socket": "/run/kvkern.sock"}, ConfigError, "hbm and socket"),
])  # fmt: skip
def test_options(
    tensors: list[torch.Tensor], tmp_path: Path, options: dict[str, Any], error: type[KvkernError], says: str
) -> None:
    options = {"capacity": 1 << 20, "hbm": 1 << 20, "arena_dir": tmp_path, "model": "m", "weights": "w"} | options
    options |= {"blocks_per_chunk": PER_CHUNK}
    if options["capacity"] is None:
        del options["capacity"]
    with pytest.raises(error, match=says):
        kvkern.open_cache(kvkern.layout.flash_attention(tensors), tensors, **options)
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("kvkern-copy")]
