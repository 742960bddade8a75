"""Accounts of a directory: every value is counted once, the oldest goes first, and memory has a limit."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from kvkern.remote.stores.file.capacity import DirectoryCapacity


def name_of(number: int) -> str:
    digits = f"{number % 256:02x}"
    return f"kvkern1/{digits}/{digits}{number:062x}"


def write(root: Path, number: int, nbytes: int = 100, age_s: float | None = None) -> str:
    path = root / name_of(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(nbytes))
    os.utime(path, None if age_s is None else (0, time.time() - age_s))
    return name_of(number)


def own(space: DirectoryCapacity, root: Path, number: int, nbytes: int = 100) -> bool:
    if not space.reserve(nbytes):
        return False
    space.wrote(write(root, number, nbytes), nbytes, 0)
    return True


def there(root: Path) -> list[int]:
    return sorted(int(path.name[2:], 16) for path in root.glob("kvkern*/*/*"))


def test_of_nothing(tmp_path: Path) -> None:
    space = DirectoryCapacity(str(tmp_path / "none"), 1000)
    assert space.wants_scan
    space.scan()
    assert (space.used_nbytes, space.wants_scan, space.trim(), space.evict(1)) == (0, False, True, False)
    assert not space.reserve(1001)
    assert space.reserve(1000)
    assert not space.reserve(1)
    space.release(1000)
    assert space.reserve(1)


@pytest.mark.parametrize("pool", [8, 1000])
def test_the_oldest_go_whatever_the_pool(tmp_path: Path, pool: int) -> None:
    """Eviction is exact while the pool lasts; then a scan is due."""
    numbers = list(range(50))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        write(tmp_path, number, age_s=1000 - number)
    space = DirectoryCapacity(str(tmp_path), 4600, pool)
    space.scan()
    assert space.used_nbytes == 5000
    assert len(space._pool) == min(pool, 50)
    assert not space.wants_scan
    assert space.trim()
    assert there(tmp_path) == list(range(4, 50))
    assert space.evict(1)  # whatever the capacity says
    assert there(tmp_path) == list(range(5, 50))
    assert space.wants_scan == (pool == 8)
    assert space.reserve(900) == (pool == 1000)  # 8 more values have to go
    space.scan()
    assert space.wants_scan is False
    if pool == 8:
        assert there(tmp_path) == list(range(8, 50))
        assert space.reserve(900)
    assert there(tmp_path) == list(range(13, 50))


def test_own_writes_are_the_youngest(tmp_path: Path) -> None:
    space = DirectoryCapacity(str(tmp_path), 500)
    space.scan()
    for number in range(20):
        assert own(space, tmp_path, number)
        assert there(tmp_path) == list(range(max(0, number - 4), number + 1))
    assert space.used_nbytes == 500


def test_own_writes_before_the_first_scan(tmp_path: Path) -> None:
    """Older values may be unknown yet: none of the process's own values goes in their place."""
    write(tmp_path, 99, age_s=1000)
    space = DirectoryCapacity(str(tmp_path), 300)
    assert [own(space, tmp_path, number) for number in range(4)] == [True, True, True, False]
    space.scan()
    assert own(space, tmp_path, 5)
    assert there(tmp_path) == [1, 2, 5]


def test_used_since_the_scan(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path, number, age_s=1000 - number)
    space = DirectoryCapacity(str(tmp_path), 400)
    space.scan()
    os.utime(tmp_path / name_of(0))
    assert own(space, tmp_path, 10)
    assert there(tmp_path) == [0, 2, 3, 10]
    for number in (11, 12):
        assert own(space, tmp_path, number)
    assert there(tmp_path) == [0, 10, 11, 12]
    assert own(space, tmp_path, 13)  # value 0 has had its second chance
    assert there(tmp_path) == [10, 11, 12, 13]


def test_an_excess_is_evicted_once(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path, number, age_s=1000 - number)
    spaces = [DirectoryCapacity(str(tmp_path), 600) for _ in range(3)]
    for space in spaces:
        space.scan()
    assert [space.trim() for space in spaces] == [True] * 3
    assert there(tmp_path) == list(range(4, 10))
    assert {space.used_nbytes for space in spaces} == {600}


def test_writers_who_know_nothing_of_each_other_stay_at_the_capacity(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path, number, age_s=1000 - number)
    spaces = [DirectoryCapacity(str(tmp_path), 2000) for _ in range(3)]
    for space in spaces:
        space.scan()
    for number in range(100, 115):
        assert own(spaces[number % 3], tmp_path, number)
        assert len(there(tmp_path)) == 20
    assert there(tmp_path) == [*range(15, 20), *range(100, 115)]


def test_files_that_somebody_has_removed(tmp_path: Path) -> None:
    """Gone values stay counted until the next scan, which is due at once when there is nothing to evict."""
    space = DirectoryCapacity(str(tmp_path), 500)
    for number in range(5):
        own(space, tmp_path, number)
    space.scan()
    for number in range(5):
        (tmp_path / name_of(number)).unlink()
    assert not space.wants_scan
    assert not own(space, tmp_path, 5)
    assert space.wants_scan
    space.scan()
    assert own(space, tmp_path, 5)
    assert (space.used_nbytes, space.wants_scan) == (100, False)


def test_what_happens_during_a_scan_counts_once(tmp_path: Path) -> None:
    space = DirectoryCapacity(str(tmp_path), 10_000)
    for number in range(0, 200, 2):
        own(space, tmp_path, number)
    real, now = space._scan_directory, iter(range(1, 200, 2))

    def scan_directory(directory: str, found: list[tuple[int, str, int]]) -> int:
        own(space, tmp_path, next(now))  # in a directory that is scanned already, still to come, or new
        gone = name_of(2 * (int(directory[-2:], 16) // 2))
        space.removed(gone, (tmp_path / gone).stat().st_size)
        (tmp_path / gone).unlink()
        own(space, tmp_path, int(directory[-2:], 16) + 256)
        return real(directory, found)

    space._scan_directory = scan_directory  # type: ignore[method-assign]
    space.scan()
    assert space.used_nbytes == 100 * len(there(tmp_path))
    space._scan_directory = real  # type: ignore[method-assign]
    before = space.used_nbytes
    space.scan()
    assert space.used_nbytes == before
    while space.evict(1):
        pass
    assert there(tmp_path) == []
    assert space.used_nbytes == 0


def test_a_name_counts_once(tmp_path: Path) -> None:
    """Two calls that put the same key at the same time both see no value there."""
    space = DirectoryCapacity(str(tmp_path), 1000)
    space.scan()
    assert [own(space, tmp_path, 1, nbytes) for nbytes in (100, 100, 300)] == [True] * 3
    assert space.used_nbytes == 300
    space.scan()
    assert own(space, tmp_path, 1, 200)
    assert space.used_nbytes == 200


def test_memory_is_bounded(tmp_path: Path) -> None:
    space = DirectoryCapacity(str(tmp_path), 1 << 40, pool=16)
    space.scan()
    for number in range(100):
        own(space, tmp_path, number)
        assert len(space._pool) <= 16
        assert len(space._written_since_scan) <= 16
    assert space.used_nbytes == 10_000
    assert not space._complete
    space.scan()
    assert (space.used_nbytes, len(space._pool), len(space._written_since_scan)) == (10_000, 16, 0)
    assert space.evict(1600)
    assert not space.evict(1)
    assert there(tmp_path) == list(range(16, 100))


def test_a_scan_that_is_stopped(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path, number)
    space = DirectoryCapacity(str(tmp_path), 500)
    space.closing = True
    space.scan()
    assert (space.used_nbytes, len(space._pool)) == (0, 0)


def test_what_cannot_be_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    space = DirectoryCapacity(str(tmp_path), 100)
    space.scan()
    (tmp_path / name_of(1)).unlink()
    (tmp_path / name_of(1)).mkdir()
    os.utime(tmp_path / name_of(1), (0, 0))
    assert not space.reserve(100)
    assert (space._leaving_nbytes, space._reserved_nbytes, space.used_nbytes) == (0, 0, 100)
