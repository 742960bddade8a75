"""Shared files at 2 MiB boundaries: their addresses, when they are unmapped, and what happens without huge pages."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from kvkern.arena import mapping
from kvkern.arena.mapping import HUGE_PAGE, map_shared, populate


@pytest.fixture
def fd(tmp_path: Path):  # type: ignore[no-untyped-def]
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 3 * HUGE_PAGE + 4096)
    yield fd
    os.close(fd)


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_two_mappings_of_a_file_are_one_memory(fd: int) -> None:
    one, other = map_shared(fd, 3 * HUGE_PAGE + 4096), map_shared(fd, 3 * HUGE_PAGE + 4096)
    assert one.ctypes.data % HUGE_PAGE == other.ctypes.data % HUGE_PAGE == 0
    assert one.ctypes.data != other.ctypes.data
    one[[0, HUGE_PAGE, -1]] = 1, 2, 3
    assert other[[0, HUGE_PAGE, -1]].tolist() == [1, 2, 3]


def test_the_memory_goes_with_its_last_view(fd: int, tmp_path: Path) -> None:
    memory = map_shared(fd, 3 * HUGE_PAGE + 4096)
    view = memory[4096:8192].view("u8")
    del memory
    gc.collect()
    view[0] = 7
    assert mapped(tmp_path / "file")
    del view
    gc.collect()
    assert not mapped(tmp_path / "file")


def test_populate_touches_every_page_and_changes_none(fd: int) -> None:
    memory = map_shared(fd, 3 * HUGE_PAGE + 4096)
    memory[5], memory[-1] = 1, 2
    populate(memory)
    assert (memory[5], memory[-1], int(memory.sum())) == (1, 2, 3)
    assert os.fstat(fd).st_blocks * 512 >= 3 * HUGE_PAGE + 4096


def test_populate_without_huge_pages(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_MADV_COLLAPSE", 9999)  # the call then fails as on a kernel before 6.1
    memory = map_shared(fd, 3 * HUGE_PAGE + 4096)
    populate(memory)
    assert not memory.any()


def test_a_failed_mapping_raises_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_shared(-1, 4096)
    with pytest.raises(OSError, match="memory"):
        map_shared(-1, 1 << 60)


@pytest.mark.parametrize("dump", [False, True])
def test_core_dumps_leave_it_out_unless_they_are_asked_for(fd: int, dump: bool) -> None:
    memory = map_shared(fd, 3 * HUGE_PAGE + 4096, dump)
    assert ("dd" in vm_flags(memory.ctypes.data)) != dump


def vm_flags(address: int) -> list[str]:
    """Return the flags of the mapping that begins at this address."""
    _, _, rest = Path("/proc/self/smaps").read_text().partition(f"\n{address:x}-")
    return rest.partition("\nVmFlags: ")[2].partition("\n")[0].split()
