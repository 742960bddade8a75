"""The share of a disk that stays free: how large it is, when it is measured, and that no store takes it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvkern.remote.stores.file import capacity as capacity_module
from kvkern.remote.stores.file import free_space
from kvkern.remote.stores.file.capacity import DirectoryCapacity
from kvkern.remote.stores.file.free_space import FreeSpace
from tests.remote.stores.conformance import Bench, key_of
from tests.remote.stores.file import files
from tests.remote.stores.file.files import makes, nbytes_in, wait_for
from tests.remote.stores.file.test_capacity import own, there, write

small_disk = files.small_disk


@dataclass
class Disk:
    """A disk of 1000 blocks of 100 bytes. What is below `root`, and what others hold, is in use."""

    root: Path
    others: int = 0
    blocks: int = 1000
    late: int = 0  # bytes of removed values that it has not given back yet
    calls: int = 0

    def statvfs(self, _path: object) -> os.statvfs_result:
        self.calls += 1
        used = self.others + self.late + nbytes_in(self.root)
        free = self.blocks - -(-used // 100)
        return os.statvfs_result((100, 100, self.blocks, free + 7, free, 0, 0, 0, 0, 255))  # 7 blocks are for root


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path)
    monkeypatch.setattr(os, "statvfs", disk.statvfs)
    return disk


@pytest.mark.parametrize(
    ("size", "percent", "kept"),
    [(10 << 40, 5, (10 << 40) // 20), (15 << 30, 5, 1 << 30), (1 << 30, 5, (1 << 30) // 10), (100_000, 20, 20_000),
     (1 << 40, 0, 0), (0, 5, 0)],
)  # fmt: skip
def test_what_is_kept_free(disk: Disk, size: int, percent: int, kept: int) -> None:
    disk.blocks = size // 100
    assert abs(FreeSpace("/", percent).kept_nbytes() - kept) < 100


def test_measured_where_it_matters(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_space, "MEASURE_S", 3600.0)
    space = FreeSpace(str(disk.root))
    assert space.headroom(100) == 90_000
    space.wrote(1000)
    assert (space.headroom(100), disk.calls) == (89_000, 1)  # what was measured, less what was written since
    assert (space.headroom(12_000), disk.calls) == (90_000, 2)  # nothing was written really
    disk.others = 95_000
    assert (space.headroom(100), disk.calls) == (90_000, 2)
    monkeypatch.setattr(free_space, "MEASURE_S", 0.0)
    assert (space.headroom(100), disk.calls) == (-5_000, 3)


def test_a_disk_that_does_not_know_its_size(disk: Disk) -> None:
    disk.blocks = 0
    assert FreeSpace(str(disk.root)).headroom(1 << 40) > 1 << 60


def space_of(disk: Disk) -> DirectoryCapacity:
    space = DirectoryCapacity(str(disk.root), 1 << 40, disk=FreeSpace(str(disk.root)))
    space.scan()
    return space


def test_own_writes_leave_the_share_free(disk: Disk) -> None:
    disk.others = 70_000
    space = space_of(disk)
    for number in range(60):
        assert own(space, disk.root, number, 1000)
        assert disk.statvfs("").f_bavail * 100 >= 10_000
    assert there(disk.root) == list(range(40, 60))
    assert space.used_nbytes == space.room_nbytes() == 20_000


def test_room_is_made_while_others_write(disk: Disk) -> None:
    space = space_of(disk)
    for number in range(60):
        assert own(space, disk.root, number, 1000)
    disk.others = 65_000
    time.sleep(free_space.MEASURE_S)
    assert space.leave_free()
    assert there(disk.root) == list(range(35, 60))
    disk.others = 95_000  # all that kvkern has is not enough
    time.sleep(free_space.MEASURE_S)
    assert not space.leave_free()
    assert there(disk.root) == []
    assert not own(space, disk.root, 70, 1000)
    disk.others = 0
    assert own(space, disk.root, 71, 1000)


def test_an_empty_pool_is_complete(disk: Disk) -> None:
    """What is written after everything was evicted may be evicted, without another scan."""
    space = space_of(disk)
    disk.others = 89_500
    assert not own(space, disk.root, 1, 1000)
    disk.others = 88_000
    for number in range(2, 6):
        assert own(space, disk.root, number, 1000)
    assert there(disk.root) == [4, 5]
    assert not space.wants_scan


def test_several_writers_make_room_once(disk: Disk) -> None:
    for number in range(60):
        write(disk.root, number, 1000, age_s=1000 - number)
    spaces = [space_of(disk) for _ in range(3)]
    for number in range(10):  # another writer's turnover: the pools of these know values that are gone
        (disk.root / f"kvkern1/{number:02x}/{number:02x}{number:062x}").unlink()
    disk.others = 60_000
    time.sleep(free_space.MEASURE_S)
    assert [space.leave_free() for space in spaces] == [True] * 3
    assert there(disk.root) == list(range(30, 60))


def test_a_disk_that_gives_back_late(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is evicted twice for the same bytes, however often somebody asks."""
    monkeypatch.setattr(capacity_module, "SETTLE_S", 3600.0)
    space = space_of(disk)
    for number in range(60):
        assert own(space, disk.root, number, 1000)
    disk.others = 35_000
    real = disk.statvfs

    def late(path: object) -> os.statvfs_result:
        disk.late = 60_000 - nbytes_in(disk.root)  # the disk is as full as before
        return real(path)

    monkeypatch.setattr(os, "statvfs", late)
    time.sleep(free_space.MEASURE_S)
    assert [space.leave_free() for _ in range(20)] == [False] * 20
    assert there(disk.root) == list(range(5, 60))
    monkeypatch.setattr(os, "statvfs", real)
    disk.late = 0
    space._in_vain_until_s = 0.0
    time.sleep(free_space.MEASURE_S)
    assert space.leave_free()
    assert there(disk.root) == list(range(5, 60))


@pytest.mark.parametrize("small_disk", ["64m"], indirect=True)
def test_a_disk_that_others_use(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real one, 70 percent in use. 5 percent and the floor, a tenth here, stay free, also when others write more."""
    value, kept = 1 << 20, 64 * (1 << 20) // 10
    (small_disk / "others").write_bytes(bytes(45 << 20))
    bench = Bench(makes(small_disk / "kv", "capacity=48MiB"), count=8, payload_nbytes=value - 4096)
    space = bench.store._capacity
    wait_for(lambda: "has a capacity of 48 MiB, but its disk has room for 1" in caplog.text)
    assert "6.4 MiB stay free for them" in caplog.text
    for start in range(0, 80, 4):
        assert bench.put([key_of(i) for i in range(start, start + 4)], bench.values()[:4]).count(True) >= 2
        assert shutil.disk_usage(small_disk).free >= kept - (64 << 10)  # directories
    assert nbytes_in(small_disk / "kv") > 6 * value
    for _ in range(2):
        with (small_disk / "others").open("ab") as file:
            file.write(bytes(5 << 20))  # kvkern writes nothing meanwhile
        wait_for(lambda: shutil.disk_usage(small_disk).free >= kept - (64 << 10))
    assert 0 < nbytes_in(small_disk / "kv") == space.used_nbytes <= 3 * value
    assert caplog.text.count("has a capacity of") == 1
    os.unlink(small_disk / "others")
    for start in range(100, 140, 4):
        assert bench.put([key_of(i) for i in range(start, start + 4)], bench.values()[:4]) == [True] * 4
    assert nbytes_in(small_disk / "kv") > 40 * value
    bench.close()
