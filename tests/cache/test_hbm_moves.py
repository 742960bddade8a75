"""HBM above DRAM: the order of moves, leases and clears. tests/cache/test_hbm_over_dram.py tests the public API."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern.arena.file import Arena
from kvkern.arena.slots import SlotState
from kvkern.cache.hbm_over_dram import HbmCache, HbmManager
from kvkern.cache.manager import Cache
from kvkern.errors import ConfigError
from kvkern.policy.lru import LRU
from kvkern.tiers.base import Lease, Reservation
from kvkern.tiers.dram import DramTier
from kvkern.tiers.hbm import HbmSlots, HbmTier, HostSlotMover
from tests.support import NAMESPACE, SHAPE, chain_keys, make_arena, write


class Parts:
    """HBM over DRAM with small slots. A test may run code during a copy."""

    def __init__(self, folder: Path, hbm: int = 8, dram: int = 16) -> None:
        self.arena: Arena = make_arena(folder, slots=dram)
        geometry = self.arena.spec.geometry
        self.slots = HbmSlots(geometry, np.zeros((hbm, geometry.part_stride), dtype=np.uint8))
        self.hbm, self.dram = HbmManager(HbmTier(self.slots)), Cache(DramTier(self.arena, LRU()))
        self.rows = HostSlotMover(self.slots, self.arena)
        self.closed: list[str] = []  # names of the threads that closed it
        self.during: Callable[[], object] = lambda: None  # called while a copy is under way
        self.cache = HbmCache(self.hbm, self.slots, self.dram, self.arena, self)
        self.cache.spare = 0
        self.wake, self.cache._schedule_moves = self.cache._schedule_moves, lambda: None  # type: ignore[method-assign]  # a test says when

    def copy_down(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        self.during()
        self.rows.copy_down(hbm, dram)

    def copy_up(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        self.during()
        self.rows.copy_up(hbm, dram)

    def close(self) -> None:
        self.closed.append(threading.current_thread().name)

    def move_until_settled(self) -> None:
        """Start the background moves that are due, and wait until none is left."""
        self.wake()
        self.cache.wait_for_moves()

    def fail_moves(self, error: Exception, spare: int) -> None:
        """Raise `error` in every copy, and let the background moves try to free `spare` slots."""

        def fail() -> None:
            raise error

        self.during = fail
        self.cache.spare = spare
        self.move_until_settled()

    def put(self, chain: list[bytes]) -> int:
        reservation: Any = self.cache.reserve(chain, chain, SHAPE)
        for slots, part in ((self.slots, reservation.hbm), (self.arena, reservation.dram)):
            for key, slot in zip(part.keys, part.slots, strict=True):
                slots.parts(0)[slot, :256] = np.frombuffer(key * 8, dtype=np.uint8)
            write(slots, part)
        return self.cache.commit(reservation)

    def check(self, lease: Lease) -> None:
        """Check that every leased slot has the header and the payload of its key."""
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
    assert [name.rpartition("_")[0] for name in parts.closed] == ["kvkern-spill"]  # a thread that moves has a context
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
        tier, real = (parts.hbm, parts.hbm.pin_least_recent) if direction == "spill" else (parts.dram, parts.dram.lease)

        def cleared(*args: Any, **kwargs: Any) -> Lease:
            lease = real(*args, **kwargs)
            parts.cache.clear(NAMESPACE)
            return lease

        setattr(tier, real.__name__, cleared)
    if direction == "spill":
        parts.cache._spill(4)
    else:
        parts.cache._promote(chain)
    vars(parts.hbm).pop("pin_least_recent", None)
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
    assert not parts.cache._spill(4)  # all of DRAM is leased, so no chunk can go there
    assert parts.cache.lookup(chain) == 8
    parts.cache.release(lease)
    assert parts.cache._spill(4)  # now DRAM evicts the chunks of `other`, which were used less
    assert (parts.cache.lookup(chain), parts.cache.lookup(other)) == (8, 0)
    assert parts.cache.counters.evicted_chunks == 4
    assert parts.cache.hbm_counters.hbm_lost_chunks == 0
    parts.cache.close()
    parts.arena.close()


def test_a_copy_that_fails_loses_only_its_chunks(parts: Parts) -> None:
    chain = chain_keys("a", 6)
    parts.put(chain)
    parts.fail_moves(OSError("the link is down"), spare=5)
    stats = parts.cache.counters.snapshot()
    assert stats["faults"] >= 1
    parts.during = lambda: None
    parts.move_until_settled()
    assert parts.hbm.num_free >= 5
    assert parts.cache.usage()["free_slots"] + len(parts.dram.all_keys()) == 16  # no slot is left granted
    lease = parts.cache.acquire(chain)
    parts.check(lease)
    parts.cache.release(lease)


def test_bad_input_while_moving_is_said_and_counted(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    parts.put(chain_keys("a", 6))
    parts.fail_moves(ConfigError("no such row"), spare=3)
    assert "no such row" in caplog.text
    assert parts.cache.counters.snapshot()["faults"] >= 1


@pytest.mark.parametrize("late", [False, True])
def test_what_fails_below_leaves_nothing_held_above(parts: Parts, late: bool) -> None:
    """Bad input in DRAM is raised, and HBM's leases and slots of the call are given back."""
    chain = chain_keys("a", 4)
    parts.put(chain)
    failed: Future[Lease] = Future()

    def refuse(*_: Any) -> Future[Lease]:
        if not late:
            raise ConfigError("no")
        failed.set_exception(ConfigError("no"))
        return failed

    parts.dram.acquire_soon = refuse  # type: ignore[method-assign]
    with pytest.raises(ConfigError):
        parts.cache.acquire(chain_keys("a", 5))
    lease = parts.hbm.pin_least_recent(8)
    assert len(lease.keys) == 4  # none is pinned
    parts.hbm.release(lease)
    parts.dram.reserve = refuse  # type: ignore[assignment,method-assign]
    if not late:
        with pytest.raises(ConfigError):
            parts.cache.reserve(chain_keys("b", 9), chain_keys("b", 9), SHAPE)
        assert parts.hbm.num_free == 4


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
    assert parts.hbm.pin_least_recent(8).keys  # the other chunks are not pinned any more


def test_finalizers_end_leases(parts: Parts) -> None:
    chain = chain_keys("a", 4)
    parts.put(chain)
    parts.cache._spill(2)
    parts.cache.release_later(parts.cache.acquire(chain))
    parts.cache.lookup(chain)
    parts.cache.acquire([])
    assert len(parts.hbm.pin_least_recent(8).keys) == 2


operations = st.lists(
    st.tuples(st.sampled_from(["put", "acquire", "release", "spill", "promote", "clear", "spoil"]), st.integers(0, 5)),
    max_size=40,
)


@given(operations)
@settings(max_examples=150)
def test_any_order_of_events(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]) -> None:
    """A lease's slots hold its chunks while it lasts. Cached chunks are found. No slot is lost."""
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
