"""HBM above DRAM, on CPU tensors: through the public API, and by its parts where an order of events matters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvkern
from kvkern.api import PagedCache
from kvkern.arena import Arena
from kvkern.cache import Cache
from kvkern.errors import ConfigError, KvkernError
from kvkern.hbm import HbmCache, HbmManager
from kvkern.policy.lru import LRU
from kvkern.slots import SlotState
from kvkern.tiers.base import Lease, Reservation
from kvkern.tiers.dram import DramTier
from kvkern.tiers.hbm import HbmSlots, HbmTier, HostRows
from tests.support import NAMESPACE, SHAPE, chain_keys, guarded, make_arena, write

NUM_BLOCKS, BLOCK_TOKENS, PER_CHUNK = 64, 4, 2
CHUNK = BLOCK_TOKENS * PER_CHUNK
PART_NBYTES, SLOT_NBYTES = 4096, 8192


def make_tensors() -> list[torch.Tensor]:
    shape = (2, NUM_BLOCKS, BLOCK_TOKENS, 2, 16)
    return [guarded(2 * NUM_BLOCKS * 256, i)[0].view(torch.bfloat16).view(shape) for i in range(2)]


def open_cache(tensors: list[torch.Tensor], folder: Path, hbm: int = 8, dram: int = 16, **options: Any) -> PagedCache:
    """With so many slots."""
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
    cache._cache.settle()
    return cache.stats()


def loads(cache: PagedCache, tensors: list[torch.Tensor], name: int, first: int, chunks: int) -> int:
    """How many of a sequence's chunks come back as they are in its own blocks, by way of the last blocks."""
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

        assert cache.store(tokens(2, 5), table(12, 5)) == 5  # 2 fit, 3 go to DRAM at once, and one is spilled for room
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
    """Ten sequences through an HBM of four slots: all come back, whole, in any order."""
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
    """In either tier, and when they were spoiled before they were copied down: a spill seals, it does not sum anew."""
    with closing(open_cache(tensors, tmp_path, hbm=8, dram=40, policy="lru")) as cache:
        stacked: Any = cache._cache
        stacked._want = lambda keys: None  # a spoiled chunk may be promoted before anybody has read it
        cache.store(tokens(1, 6), table(0, 6))
        if where == "dram":
            stacked._spill(8)
        lease = cache.match(tokens(1, 6))
        slot = lease.lease.slots[2]
        assert (slot >= stacked.first_slot) == (where != "dram")
        rows = stacked._hbm_slots.parts(0) if where != "dram" else stacked._dram_slots.parts(0)
        rows[slot - stacked.first_slot * (where != "dram"), 5] ^= 1
        lease.release()
        if where == "spilled":
            assert stacked._spill(8)
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


def test_leased_chunks_stay(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    """Nothing can be spilled: stores go to DRAM, and what was promised can be loaded."""
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


# -- by its parts ----------------------------------------------------------------------------------------------------------


class Parts:
    """A stacked cache over small slots, whose copies a test may stop."""

    def __init__(self, folder: Path, hbm: int = 8, dram: int = 16) -> None:
        self.arena: Arena = make_arena(folder, slots=dram)
        geometry = self.arena.spec.geometry
        self.slots = HbmSlots(geometry, np.zeros((hbm, geometry.part_stride), dtype=np.uint8))
        self.hbm, self.dram = HbmManager(HbmTier(self.slots)), Cache(DramTier(self.arena, LRU()))
        self.rows = HostRows(self.slots, self.arena)
        self.during: Callable[[], object] = lambda: None  # called while a copy is under way
        self.cache = HbmCache(self.hbm, self.slots, self.dram, self.arena, self)
        self.cache.spare = 0
        self.wake, self.cache._wake = self.cache._wake, lambda: None  # type: ignore[method-assign]  # a test says when

    def down(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        self.during()
        self.rows.down(hbm, dram)

    def up(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        self.during()
        self.rows.up(hbm, dram)

    def put(self, chain: list[bytes]) -> int:
        reservation: Any = self.cache.reserve(chain, chain, SHAPE)
        for slots, part in ((self.slots, reservation.hbm), (self.arena, reservation.dram)):
            for key, slot in zip(part.keys, part.slots, strict=True):
                slots.parts(0)[slot, :256] = np.frombuffer(key * 8, dtype=np.uint8)
            write(slots, part)
        return self.cache.commit(reservation)

    def check(self, lease: Lease) -> None:
        """The payload of every leased slot is its key's."""
        for key, slot in zip(lease.keys, lease.slots, strict=True):
            above = slot >= self.cache.first_slot
            rows, at = (self.slots, slot - self.cache.first_slot) if above else (self.arena, slot)
            assert rows.parts(0)[at, :256].tobytes() == key * 8
            assert bytes(rows.headers["key"][at]) == key
            assert rows.headers["state"][at] == SlotState.READY


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    parts = Parts(tmp_path)
    yield parts
    parts.cache.close()
    parts.arena.close()


def test_a_chunk_that_is_spilled_is_found_all_the_while(parts: Parts) -> None:
    chain = chain_keys("a", 5)
    parts.put(chain)
    seen: list[int] = []

    def look() -> None:
        lease = parts.cache.acquire(chain)
        parts.check(lease)
        seen.append(len(lease.slots))
        parts.cache.release(lease)

    parts.during = look
    assert parts.cache._spill(3)
    look()
    assert seen == [5, 5]
    lease = parts.cache.acquire(chain)
    assert [slot >= parts.cache.first_slot for slot in lease.slots] == [True, True, False, False, False]  # tail first
    parts.cache.release(lease)
    assert parts.hbm.num_free == 6


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("direction", ["spill", "promote"])
def test_what_is_cleared_does_not_come_back(parts: Parts, direction: str, when: str) -> None:
    chain = chain_keys("a", 4)
    parts.put(chain)
    if direction == "promote":
        parts.cache._spill(4)
    if when == "during":
        parts.during = lambda: parts.cache.clear(NAMESPACE)
    else:
        tier, real = (parts.hbm, parts.hbm.retire) if direction == "spill" else (parts.dram, parts.dram.lease)

        def cleared(*args: Any, **kwargs: Any) -> Lease:
            lease = real(*args, **kwargs)
            parts.cache.clear(NAMESPACE)
            return lease

        setattr(tier, real.__name__, cleared)
    if direction == "spill":
        parts.cache._spill(4)
    else:
        parts.cache._promote(chain)
    vars(parts.hbm).pop("retire", None)
    vars(parts.dram).pop("lease", None)
    parts.during = lambda: None
    assert parts.cache.lookup(chain) == 0
    assert parts.cache.usage()["free_slots"] == 16
    assert parts.hbm.num_free == 8
    assert parts.put(chain) == 4


def test_what_dram_has_is_not_copied_again(parts: Parts) -> None:
    chain = chain_keys("a", 4)
    parts.put(chain)
    parts.cache._spill(4)
    parts.cache._promote(chain)
    assert parts.cache.usage() | {"hbm_spilled_chunks": 4, "hbm_promoted_chunks": 4} == parts.cache.usage()
    parts.during = lambda: pytest.fail("nothing to copy")
    lease = parts.cache.acquire(chain)
    assert min(lease.slots) >= parts.cache.first_slot
    parts.cache.release(lease)

    def copied(*_: Any) -> None:
        assert len(_[0]) == 0

    parts.cache._down = copied  # type: ignore[method-assign]
    assert parts.cache._spill(4)
    assert parts.cache.lookup(chain) == 4
    assert parts.cache.hbm_counters.hbm_lost_chunks == 0


def test_without_room_below_everything_stays(tmp_path: Path) -> None:
    parts = Parts(tmp_path, hbm=8, dram=4)
    other, chain = chain_keys("b", 4), chain_keys("a", 8)
    assert parts.put(chain) == 8
    assert parts.put(other) == 4  # in DRAM
    lease = parts.cache.acquire(other)
    assert not parts.cache._spill(4)  # all of DRAM is leased: nothing can go there
    assert parts.cache.lookup(chain) == 8
    parts.cache.release(lease)
    assert parts.cache._spill(4)  # now it evicts what it had, for what is used more
    assert (parts.cache.lookup(chain), parts.cache.lookup(other)) == (8, 0)
    assert parts.cache.counters.evicted_chunks == 4
    assert parts.cache.hbm_counters.hbm_lost_chunks == 0
    parts.cache.close()
    parts.arena.close()


def test_a_copy_that_fails_loses_only_its_chunks(parts: Parts) -> None:
    chain = chain_keys("a", 6)
    parts.put(chain)

    def fail() -> None:
        raise OSError("the link is down")

    parts.during = fail
    parts.cache.spare = 5
    parts.wake()
    parts.cache.settle()
    stats = parts.cache.counters.snapshot()
    assert stats["faults"] >= 1
    parts.during = lambda: None
    parts.wake()
    parts.cache.settle()
    assert parts.hbm.num_free >= 5
    assert parts.cache.usage()["free_slots"] + len(parts.dram.all_keys()) == 16  # nothing is left granted
    lease = parts.cache.acquire(chain)
    parts.check(lease)
    parts.cache.release(lease)


def test_bad_input_while_moving_is_said_and_counted(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    parts.put(chain_keys("a", 6))

    def fail() -> None:
        raise ConfigError("no such row")

    parts.during = fail
    parts.cache.spare = 3
    parts.wake()
    parts.cache.settle()
    assert "no such row" in caplog.text
    assert parts.cache.counters.snapshot()["faults"] >= 1


def test_empty_batches(parts: Parts) -> None:
    assert parts.cache.lookup([]) == 0
    lease = parts.cache.acquire([])
    assert (lease.keys, lease.slots) == ((), ())
    assert parts.cache.release(lease) == 0
    reservation = parts.cache.reserve([], [], SHAPE)
    assert reservation.slots == ()
    assert parts.cache.commit(reservation) == 0
    assert parts.cache.release(Lease((), ())) == 0
    assert parts.cache.commit(Reservation((), (), ())) == 0
    assert not parts.cache._spill(4)
    parts.cache._promote([])


def test_windows_take_what_there_is(parts: Parts) -> None:
    chain = chain_keys("a", 5)
    parts.put(chain)
    parts.cache._spill(2)
    parts.hbm.drop([chain[1]])
    parts.dram.drop([chain[4]])
    lease = parts.cache.acquire(chain, prefix=False)
    assert lease.keys == (chain[0], chain[2], chain[3])
    parts.check(lease)
    parts.cache.release(lease)
    lease = parts.cache.acquire(chain)
    assert lease.keys == (chain[0],)
    parts.cache.release(lease)
    assert parts.hbm.retire(8).keys  # the rest is not pinned any more


def test_finalizers_end_leases(parts: Parts) -> None:
    chain = chain_keys("a", 4)
    parts.put(chain)
    parts.cache._spill(2)
    parts.cache.release_later(parts.cache.acquire(chain))
    parts.cache.lookup(chain)
    parts.cache.acquire([])
    assert len(parts.hbm.retire(8).keys) == 2


operations = st.lists(
    st.tuples(st.sampled_from(["put", "acquire", "release", "spill", "promote", "clear", "spoil"]), st.integers(0, 5)),
    max_size=40,
)


@given(operations)
@settings(max_examples=150)
def test_any_order_of_events(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]) -> None:
    """A lease's slots hold its chunks while it lasts; what is cached is found; every slot is accounted for."""
    parts = Parts(tmp_path_factory.mktemp("arena"), hbm=5, dram=9)
    cache, leases = parts.cache, []
    chains = [chain_keys(name, 1 + name % 4) for name in range(6)]
    for step, n in steps:
        if step == "put":
            parts.put(chains[n])
        elif step == "acquire":
            want = cache.lookup(chains[n])
            leases.append(lease := cache.acquire(chains[n]))
            assert len(lease.keys) == want
        elif step == "release" and leases:
            cache.release(leases.pop(n % len(leases)))
        elif step == "spill":
            cache._spill(n)
        elif step == "promote":
            cache._promote(chains[n])
        elif step == "clear":
            cache.clear(NAMESPACE)
        elif step == "spoil" and leases and leases[-1].slots and leases[-1].slots[0] < cache.first_slot:
            parts.arena.mark_bad(np.array(leases[-1].slots[:1]))
            cache.release(leases.pop())
        for lease in leases:
            for key, slot in zip(lease.keys, lease.slots, strict=True):
                above = slot >= cache.first_slot
                rows, at = (parts.slots, slot - cache.first_slot) if above else (parts.arena, slot)
                assert rows.parts(0)[at, :256].tobytes() == key * 8
    for lease in leases:
        cache.release(lease)
    cache.clear()
    assert (parts.hbm.num_free, cache.usage()["free_slots"]) == (5, 9)
    cache.close()
    parts.arena.close()
