"""Temporary files: those of killed writers go, and no others, whatever clocks say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvkern.remote.stores.file import leftovers as leftovers_module
from kvkern.remote.stores.file.capacity import REFRESH_S, DirectoryCapacity
from kvkern.remote.stores.file.clock import FileSystemClock
from kvkern.remote.stores.file.leftovers import LEFTOVER_S, Leftovers
from tests.remote.stores.conformance import HIT, Bench, key_of
from tests.remote.stores.file import files
from tests.remote.stores.file.files import VALUE, file_of, makes, temporaries_in, values_in
from tests.remote.stores.file.test_capacity import own, there, write

store_path = files.store_path

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def clock(tmp_path: Path) -> FileSystemClock:
    clock = FileSystemClock(str(tmp_path))
    clock.measure()
    return clock


def test_old_and_unchanged(tmp_path: Path, clock: FileSystemClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers_module, "WATCHED_S", 0.1)
    leftovers, path = Leftovers(clock), tmp_path / "file"

    def scan() -> bool:
        leftovers.begin_scan()
        return leftovers.is_leftover(str(path), path.stat())

    path.write_bytes(b"x")
    assert not scan()
    time.sleep(0.1)
    assert not scan()  # young
    os.utime(path, (0, time.time() - LEFTOVER_S - 60))
    assert not scan()  # it looks old, but it has just changed
    time.sleep(0.1)
    path.write_bytes(b"xy")
    os.utime(path, (0, time.time() - LEFTOVER_S - 60))
    assert not scan()  # a writer whose clock is behind, on a file system that believes it
    time.sleep(0.1)
    assert scan()


def test_watched_files_have_a_limit(tmp_path: Path, clock: FileSystemClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers_module, "MAX_WATCHED", 3)
    monkeypatch.setattr(leftovers_module, "WATCHED_S", 0.0)
    leftovers, path = Leftovers(clock), tmp_path / "file"
    path.write_bytes(b"x")
    for number in range(10):
        leftovers.is_leftover(str(number), path.stat())
    assert len(leftovers._now) == 3
    leftovers.begin_scan()
    leftovers.begin_scan()
    assert not leftovers._before


def test_nothing_is_a_leftover_while_the_clock_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers_module, "WATCHED_S", 0.0)
    leftovers, path = Leftovers(FileSystemClock(str(tmp_path / "none"))), tmp_path / "file"
    path.write_bytes(b"x")
    os.utime(path, (0, 0))
    assert not leftovers.is_leftover(str(path), path.stat())


AHEAD = """
import sys, time
from pathlib import Path
from kvkern.remote.stores.file import leftovers
real = time.time
time.time = lambda: real() + 1200
time.time_ns = lambda: int(time.time() * 1e9)
leftovers.WATCHED_S = 0.0
from tests.remote.stores.conformance import Bench, key_of
from tests.remote.stores.file.files import makes
bench = Bench(makes(Path(sys.argv[1])), count=1, payload_nbytes=8192)
bench.store._scan_s = 0.0
bench.store._scan_now.set()
bench.put([key_of(10**6)], bench.values())
print("scanning", flush=True)
sys.stdin.read()
"""


def test_a_node_whose_clock_is_ahead_costs_no_value(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It scans all the time while this process writes slowly, so that it sees many temporary files."""
    bench = Bench(makes(store_path), count=8, payload_nbytes=8192)
    real = os.rename

    def slow(old: str, new: str, **folders: int) -> None:
        time.sleep(0.02)
        real(old, new, **folders)

    monkeypatch.setattr(os, "rename", slow)
    with subprocess.Popen(
        [sys.executable, "-c", AHEAD, str(store_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"scanning\n"
        for start in range(0, 160, 8):
            assert bench.put([key_of(i) for i in range(start, start + 8)], bench.values()) == [True] * 8
        other.stdin.close()
    assert other.returncode == 0
    assert len(values_in(store_path)) == 161
    assert temporaries_in(store_path) == []
    bench.close()


def test_last_uses_are_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is ahead or behind changes nothing about what goes first."""
    real = time.time_ns
    for ahead_s in (-1200, 1200):
        monkeypatch.setattr(time, "time_ns", lambda ahead_s=ahead_s: real() + ahead_s * 10**9)
        root = tmp_path / str(ahead_s)
        space = DirectoryCapacity(str(root), 300)
        for number in range(3):
            assert own(space, root, number)
        space.scan()
        assert own(space, root, 3)
        time.sleep(0.02)  # the clock of files is coarse
        os.utime(root / f"kvkern1/01/01{1:062x}")  # another node uses it
        os.utime(root / f"kvkern1/03/03{3:062x}")
        for number in (4, 5):
            assert own(space, root, number)
        assert there(root) == [3, 4, 5]


def test_a_time_in_the_future_is_set_right(tmp_path: Path) -> None:
    """A clock that was ahead, and was set back, does not keep old values for ever."""
    for number in range(4):
        write(tmp_path, number, age_s=1000 - number)
    write(tmp_path, 9, age_s=-86_400)
    space = DirectoryCapacity(str(tmp_path), 500)
    space.scan()
    name = tmp_path / f"kvkern1/09/09{9:062x}"
    assert abs(name.stat().st_mtime - time.time()) < REFRESH_S
    for number in range(10, 15):
        assert own(space, tmp_path, number)
    assert there(tmp_path) == [10, 11, 12, 13, 14]


def test_a_reader_refreshes_by_the_file_systems_clock(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 1200)
    bench = Bench(makes(store_path), count=1, payload_nbytes=8192)
    assert bench.put([key_of(1)], bench.values()) == [True]
    path = file_of(store_path, 1)
    assert path.stat().st_size == VALUE
    for age_s, refreshed in ((REFRESH_S / 2, False), (2 * REFRESH_S, True), (-2 * REFRESH_S, True)):
        os.utime(path, (0, real() - age_s))
        before = path.stat().st_mtime_ns
        assert bench.get([key_of(1)], bench.into()) == [HIT]
        assert (path.stat().st_mtime_ns != before) == refreshed
    bench.close()
