"""Registration: the whole arena or nothing, in regions that end between slots."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.arena.slots import PAGE
from kvkern.errors import ArenaError
from kvkern.transfer.gpu.pinned_arena import PinnedArena, pages_per_numa_node, split_into_regions
from tests.support import make_arena
from tests.transfer.gpu.fake_device import FakeDevice
from tests.transfer.gpu.orders import Random


@given(slots=st.integers(1, 200), pages=st.integers(1, 50), limit=st.integers(1, 300))
def test_regions_are_whole_slots(slots: int, pages: int, limit: int) -> None:
    slot_nbytes = pages * PAGE
    found = split_into_regions(slots, slot_nbytes, limit * PAGE)
    assert found[0][0] == 0
    assert sum(nbytes for _, nbytes in found) == PAGE + slots * slot_nbytes
    for (begin, nbytes), (following, _) in pairwise(found):
        assert begin + nbytes == following
        assert (following - PAGE) % slot_nbytes == 0
    if limit > pages:
        assert max(nbytes for _, nbytes in found) <= limit * PAGE


def test_the_whole_arena_is_registered_and_unregistered(tmp_path: Path) -> None:
    arena, device, lines = make_arena(tmp_path, slots=5), FakeDevice(Random(0)), []
    pinned = PinnedArena(arena, device, lines.append, max_nbytes=2 * arena.spec.geometry.slot_nbytes + PAGE)
    assert len(device.registered) == 3
    assert sum(device.registered.values()) == arena.spec.nbytes
    assert len(lines) == 3
    assert "registered after" in lines[-1]
    assert pinned.shift == 0
    pinned.close()
    pinned.close()
    assert device.registered == {}


def test_the_closing_thread_is_attached_to_the_device(tmp_path: Path) -> None:
    """This holds for any closing thread: the driver refuses every region to a thread without a context (CUDA error 201)."""
    arena, device = make_arena(tmp_path, slots=5), FakeDevice(Random(0))
    pinned = PinnedArena(arena, device)
    thread = threading.Thread(target=pinned.close)
    thread.start()
    thread.join()
    assert device.registered == {}
    assert device.faults == []


def test_half_a_registration_is_undone_and_says_why(tmp_path: Path) -> None:
    arena, device = make_arena(tmp_path, slots=5), FakeDevice(Random(0))
    device.refuse_after = 2
    with pytest.raises(ArenaError, match=r"(?s)out of memory.*lock .*memlock=-1.*`capacity`"):
        PinnedArena(arena, device, max_nbytes=2 * arena.spec.geometry.slot_nbytes + PAGE)
    assert device.registered == {}


def test_a_shift_that_differs_among_regions_is_none(tmp_path: Path) -> None:
    arena, device = make_arena(tmp_path, slots=5), FakeDevice(Random(0))
    device.shifts = lambda address: 4096
    assert PinnedArena(arena, device).shift == 4096
    device.registered.clear()
    start = arena.bytes.ctypes.data
    device.shifts = lambda address: address - start
    assert PinnedArena(arena, device, max_nbytes=2 * arena.spec.geometry.slot_nbytes + PAGE).shift is None


NUMA_MAPS = """\
7f0000000000 default file=/lib/x mapped=3 N0=3
7f1000000000 prefer:1 file=/dev/shm/kvkern-0-a dirty=100 active=0 N0=25 N1=75 kernelpagesize_kB=4
"""


def test_the_memory_nodes_of_the_arena_are_reported(tmp_path: Path) -> None:
    maps = tmp_path / "numa_maps"
    maps.write_text(NUMA_MAPS)
    assert pages_per_numa_node(0x7F1000000000, maps) == {0: 25, 1: 75}
    assert pages_per_numa_node(0x7F2000000000, maps) == {}
    assert pages_per_numa_node(0x7F1000000000, tmp_path / "none") == {}
    arena, device, lines = make_arena(tmp_path, slots=5), FakeDevice(Random(0)), []
    device.node = 1
    PinnedArena(arena, device, lines.append)
    assert "memory node 1" in lines[-1]
