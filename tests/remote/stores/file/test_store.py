"""The directory as a store: the conformance suite with and without O_DIRECT, several writers, full disks, crashes."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.stores.base import RemoteError
from kvkern.remote.stores.file import leftovers
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from tests.remote.stores.conformance import HIT, MISS, TIMEOUT_S, Bench, Conformance, MakeStore, Memory, key_of
from tests.remote.stores.file import files
from tests.remote.stores.file.files import (
    VALUE,
    file_of,
    knows_direct,
    makes,
    nbytes_in,
    temporaries_in,
    values_in,
    wait_for,
)

store_path, bench = files.store_path, files.bench

ROOT = Path(__file__).resolve().parents[4]


class TestBuffered(Conformance):
    @pytest.fixture
    def make(self, tmp_path: Path) -> MakeStore:
        return makes(tmp_path / "store", "direct=no")


class TestDirect(Conformance):
    @pytest.fixture
    def make(self, tmp_path: Path) -> MakeStore:
        if not knows_direct(tmp_path):
            pytest.skip(f"the file system of {tmp_path} knows no O_DIRECT")
        return makes(tmp_path / "store", "direct=yes&threads=2&sync=yes")

    def test_what_is_aligned_goes_past_the_page_cache(self, make: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
        flags: list[int] = []
        real = os.open

        def note(path: Any, flag: int, *more: int, **named: Any) -> int:
            flags.append(flag & os.O_DIRECT)
            return real(path, flag, *more, **named)

        for payload_nbytes, direct in ((8192, os.O_DIRECT), (8193, 0)):
            bench = Bench(make, count=1, payload_nbytes=payload_nbytes)
            monkeypatch.setattr(os, "open", note)
            flags.clear()
            assert bench.put([key_of(payload_nbytes)], bench.values()) == [True]
            assert bench.get([key_of(payload_nbytes)], bench.into()) == [HIT]
            assert bench.read(0)
            assert set(flags) == {direct, 0}  # 0: sync of the directory
            monkeypatch.undo()
            bench.close()


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "message"), [
    ("file://relative/path", r"file://relative/path does not name a directory of this machine\. Say file:///path"),
    ("file:///", "does not name a directory"), ("file://me:p@/x", "does not name a directory"),
    ("file:///x?direct=maybe", r"direct of file:///x is 'maybe'\. Give auto, yes or no"),
    ("file:///x?threads=0", "threads of file:///x is '0'"), ("file:///x?capacity=lots", "capacity of file:///x is 'lots'"),
    ("file:///x?keep_free_percent=91", r"keep_free_percent of file:///x is '91'\. Give an integer in 0\.\.90"),
    ("file:///x?scan_s=0", "scan_s of file:///x is '0'"), ("file:///x?dir=1", "unknown key 'dir'.*'direct'"),
])  # fmt: skip
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_store(RemoteUrl.parse(url))


def open_and_close(make: MakeStore) -> None:
    async def main() -> None:
        store = make()
        await store.open()
        await store.close()

    asyncio.run(main())


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    threads = threading.active_count()
    for path in (tmp_path / "no" / "parent", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"file://{path} cannot be used: .*\. Give a directory that"):
            open_and_close(makes(path))
    with pytest.raises(
        ConfigError, match=r"capacity of file://.* is 64 TiB, but its file system has .*\. Lower the capacity"
    ):
        open_and_close(makes(tmp_path / "new", "capacity=64TiB"))
    assert (tmp_path / "file").read_text() == "mine"
    assert threading.active_count() == threads


def test_a_directory_without_rights(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("rights are not tested: this user is root and has them all")
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"cannot be used: .*Permission denied"):
        open_and_close(makes(tmp_path / "store"))


def test_a_file_system_without_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *more: int, **named: Any) -> int:
        fd = real(path, flags & ~os.O_DIRECT, *more, **named)
        if flags & os.O_DIRECT:  # as Linux does: the file exists nevertheless
            os.close(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return fd

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        ConfigError, match=r"direct of file://.* is yes, but its file system has no O_DIRECT\. Use direct=auto"
    ):
        open_and_close(makes(tmp_path / "a", "direct=yes"))
    bench = Bench(makes(tmp_path / "b"), count=1, payload_nbytes=8192)
    assert bench.put([key_of(1)], bench.values()) == [True]
    assert bench.get([key_of(1)], bench.into()) == [HIT]
    assert temporaries_in(tmp_path / "a") == temporaries_in(tmp_path / "b") == []
    bench.close()


def test_a_directory_that_cannot_be_reached_now(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, gone = os.statvfs, True

    def sometimes(path: Any) -> os.statvfs_result:
        if gone:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "statvfs", sometimes)
    monkeypatch.setattr("kvkern.remote.stores.file.store._RETRY_S", 0.05)
    store = makes(store_path)()
    memory = Memory(2, 8192)

    async def main() -> None:
        nonlocal gone
        with pytest.raises(RemoteError, match="Input/output error"):
            await store.open()
        with pytest.raises(RemoteError, match=r"not reached yet \(.*Input/output error"):
            await store.put([key_of(1)], [memory.fill(0, 1)], TIMEOUT_S)
        assert await store.get([key_of(1)], [memory.parts(1)], TIMEOUT_S) == [MISS]
        gone = False
        await asyncio.sleep(0.5)  # it reaches the directory by itself
        assert await store.put([key_of(1)], [memory.parts(0)], TIMEOUT_S) == [True]
        assert await store.get([key_of(1)], [memory.parts(1)], TIMEOUT_S) == [HIT]
        await store.close()

    asyncio.run(main())
    assert memory.holds(1, memory.parts(0))


def test_a_file_system_that_does_not_know_its_size(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((4096, 4096, *[0] * 8)))
    with pytest.raises(ConfigError, match=r"does not say how large it is\. Add \?capacity="):
        open_and_close(makes(store_path))
    bench = Bench(makes(store_path, f"capacity={2 * VALUE}"), count=1, payload_nbytes=8192)
    wait_for(lambda: bench.store._capacity._complete)
    assert [bench.put([key_of(i)], bench.values()) for i in range(4)] == [[True]] * 4
    assert len(values_in(store_path)) == 2
    bench.close()


def test_reopened(store_path: Path, bench: Bench) -> None:
    keys = [key_of(i) for i in range(4)]
    bench.put(keys, bench.values()[:4])
    other = bench.another()
    assert bench.exists(keys, store=other) == [True] * 4
    assert bench.get(keys, bench.into()[:4], store=other) == [HIT] * 4
    assert all(bench.read(row) for row in range(4))
    wait_for(lambda: other._capacity.used_nbytes == 4 * VALUE)


# -- the cap -----------------------------------------------------------------------------------------------------------


def test_what_was_not_used_goes_first(store_path: Path) -> None:
    bench = Bench(makes(store_path, f"capacity={10 * VALUE}"), count=10, payload_nbytes=8192)
    keys = [key_of(i) for i in range(30)]
    assert bench.put(keys[:10], bench.values()) == [True] * 10
    for age, number in enumerate(range(10)):  # the last hour: 0 is the oldest
        os.utime(file_of(store_path, number), (0, time.time() - 3600 + age))
    store = bench.another()  # the first store does not know of these
    wait_for(lambda: store._capacity.used_nbytes == 10 * VALUE)
    assert bench.get(keys[2:4], bench.into()[:2], store=store) == [HIT, HIT]
    assert bench.put(keys[10:14], bench.values()[:4], store=store) == [True] * 4
    assert bench.exists(keys[:14], store=store) == [*[False] * 2, *[True] * 2, *[False] * 2, *[True] * 8]
    assert nbytes_in(store_path) == 10 * VALUE
    assert bench.put(keys[14:24], bench.values(), store=store) == [True] * 10
    assert bench.exists(keys[:24], store=store) == [*[False] * 14, *[True] * 10]
    bench.run(store.delete(keys[14:20], TIMEOUT_S))
    assert store._capacity.used_nbytes == nbytes_in(store_path) == 4 * VALUE
    bench.close()


def test_a_value_above_the_capacity(store_path: Path) -> None:
    bench = Bench(makes(store_path, f"capacity={VALUE - 1}"), count=1, payload_nbytes=8192)
    assert bench.put([key_of(1)], bench.values()) == [False]
    assert bench.exists([key_of(1)]) == [False]
    bench.close()


def test_a_cap_that_was_lowered(store_path: Path, bench: Bench) -> None:
    assert bench.put([key_of(i) for i in range(8)], bench.values()) == [True] * 8
    other = Bench(makes(store_path, f"capacity={3 * VALUE}"), count=1, payload_nbytes=8192)
    wait_for(lambda: nbytes_in(store_path) == 3 * VALUE)  # by the scan, without a write
    other.close()


def test_accounts_after_a_rush(store_path: Path) -> None:
    """Writes, deletes and scans at once: the counted values are those that are there, below the capacity."""
    bench = Bench(makes(store_path, f"capacity={20 * VALUE}&threads=4"), payload_nbytes=8192)
    store = bench.store
    store._scan_s = 0.005
    store._scan_now.set()
    values = bench.values()

    async def rush() -> None:
        for start in range(0, 400, 8):
            keys = [key_of(i % 90) for i in range(start, start + 8)]
            await asyncio.gather(
                store.put(keys, values, TIMEOUT_S), store.put(keys[::-1], values, TIMEOUT_S),
                store.delete(keys[::3], TIMEOUT_S), store.get(keys, bench.into(), TIMEOUT_S),
            )  # fmt: skip

    bench.run(rush())
    assert store._capacity._reserved_nbytes == store._capacity._leaving_nbytes == 0
    wait_for(lambda: store._capacity.used_nbytes == nbytes_in(store_path) <= 20 * VALUE)
    assert nbytes_in(store_path) > 5 * VALUE
    bench.close()


WRITER = """
import sys, time
from pathlib import Path
from tests.remote.stores.conformance import Bench, key_of
from tests.remote.stores.file import files
from tests.remote.stores.file.files import makes
path, first = Path(sys.argv[1]), int(sys.argv[2])
bench = Bench(makes(path, sys.argv[3]), count=2, payload_nbytes=8192)
bench.store._scan_s = 0.1
bench.store._scan_now.set()
for start in range(first, first + 200, 2):
    assert bench.put([key_of(start), key_of(start + 1)], bench.values(first)) == [True, True]
    time.sleep(0.01)
bench.close()
"""


def test_two_processes_share_a_directory(store_path: Path) -> None:
    """Writers exceed the capacity by no more than they have not seen of each other, and none evicts for two."""
    foreign = store_path / "kvkern1" / "notes"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    options = f"capacity={40 * VALUE}&threads=2"
    command = [sys.executable, "-c", WRITER, str(store_path)]
    writers = [subprocess.Popen([*command, first, options], cwd=ROOT) for first in ("0", "1000")]
    counts = []
    while any(writer.poll() is None for writer in writers):
        counts.append(len(values_in(store_path)))
        time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert max(counts) <= 70
    full = next(row for row, count in enumerate(counts) if count >= 40)
    assert min(counts[full:]) >= 25
    assert temporaries_in(store_path) == []
    bench = Bench(makes(store_path, options), count=1, payload_nbytes=8192)
    wait_for(lambda: nbytes_in(store_path) <= 40 * VALUE)
    assert foreign.read_text() == "mine"
    bench.close()


def test_no_room_while_nothing_can_be_scanned(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(makes(store_path, f"capacity={VALUE}"), count=2, payload_nbytes=8192)
    wait_for(lambda: bench.store._capacity._complete)
    monkeypatch.setattr(bench.store._capacity, "_pop_oldest", lambda: None)
    values = bench.values()
    assert bench.put([key_of(1)], values[:1]) == [True]
    assert bench.put([key_of(2)], values[1:]) == [False]
    bench.store._scan_error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(RemoteError, match=r"cannot be scanned for values to evict \(.*Permission denied"):
        bench.put([key_of(2)], bench.values()[1:])
    bench.close()


# -- crashes and other people's files ------------------------------------------------------------------------------------

CRASH = """
import os, signal, sys
from pathlib import Path
from tests.remote.stores.conformance import Bench, key_of
from tests.remote.stores.file import files
from tests.remote.stores.file.files import makes
os.rename = lambda *names, **folders: os.kill(os.getpid(), signal.SIGKILL)
bench = Bench(makes(Path(sys.argv[1])), count=1, payload_nbytes=8192)
bench.put([key_of(1)], bench.values())
"""


def test_killed_between_write_and_rename(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "WATCHED_S", 0.0)
    done = subprocess.run([sys.executable, "-c", CRASH, str(store_path)], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    (left,) = temporaries_in(store_path)
    assert left.stat().st_size == VALUE
    foreign = [left.parent / ".kvkern-1.tmp", left.parent / "x.tmp", store_path / left.name]
    for path in foreign:
        path.write_text("mine")
        os.utime(path, (0, 0))
    bench = Bench(makes(store_path), count=1, payload_nbytes=8192)
    wait_for(lambda: bench.store._capacity._complete)
    assert left.exists()  # another process may still write it
    assert bench.exists([key_of(1)]) == [False]
    os.utime(left, (0, time.time() - 1000))
    bench.store._scan_now.set()
    wait_for(lambda: not left.exists())
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    bench.close()


def test_other_files_are_not_touched(store_path: Path) -> None:
    name = key_of(5).hex()
    foreign = [
        store_path / "README", store_path / "kvkern1" / "notes", store_path / "kvkern" / name[:2] / name,
        store_path / "kvkern1x" / name[:2] / name, store_path / "kvkern1" / "zz" / name, store_path / "kvkern1" / "ab" / name,
        store_path / "kvkern1" / name[:2] / name[:40], store_path / "kvkern1" / name[:2] / ("05AB" * 16),
    ]  # fmt: skip
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        os.utime(path, (0, 0))
    link = store_path / "kvkern1" / name[:2] / ("05" * 32)
    link.symlink_to(foreign[0])
    older = store_path / "kvkern0" / name[:2] / name  # of another version: counted and evicted like all values
    older.parent.mkdir(parents=True)
    older.write_bytes(bytes(VALUE))
    bench = Bench(makes(store_path, f"capacity={4 * VALUE}"), payload_nbytes=8192)
    wait_for(lambda: bench.store._capacity._complete)
    assert bench.store._capacity.used_nbytes == VALUE
    assert bench.put([key_of(i) for i in range(8)], bench.values()) == [True] * 8
    assert len(values_in(store_path)) - 1 == 4 + sum(len(path.name) == 64 for path in foreign[4:])  # 1: the link
    assert not older.exists()
    assert link.is_symlink()
    assert [path.read_text() for path in foreign] == ["mine"] * len(foreign)
    bench.close()
