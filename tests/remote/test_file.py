"""The directory as a store: the conformance suite with and without O_DIRECT, several writers, full disks, crashes."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.base import RemoteError, RemoteUrl, make_store
from tests.remote.conformance import HIT, MISS, TIMEOUT_S, WRONG_SIZE, Bench, Conformance, MakeStore, Memory, key_of

ROOT = Path(__file__).resolve().parents[2]
VALUE = 4096 + 8192  # bytes of the small values here


def makes(path: Path, options: str = "") -> MakeStore:
    return lambda: make_store(RemoteUrl.parse(f"file://{path}?{options}" if options else f"file://{path}"))


def knows_direct(path: Path) -> bool:
    try:
        os.close(os.open(path / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def values_in(path: Path) -> list[Path]:
    return [p for p in path.glob("kvkern1/??/*") if len(p.name) == 64]


def temporaries_in(path: Path) -> list[Path]:
    return list(path.glob("kvkern1/*/.kvkern-*.tmp"))


def nbytes_in(path: Path) -> int:
    total = 0
    for value in values_in(path):
        with suppress(FileNotFoundError):  # evicted meanwhile
            total += value.stat().st_size
    return total


def file_of(path: Path, number: int) -> Path:
    name = key_of(number).hex()
    return path / "kvkern1" / name[:2] / name


def wait_for(what: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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

        def note(path: Any, flag: int, *more: int) -> int:
            flags.append(flag & os.O_DIRECT)
            return real(path, flag, *more)

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


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def bench(store_path: Path) -> Iterator[Bench]:
    bench = Bench(makes(store_path), payload_nbytes=8192)
    yield bench
    bench.close()


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "message"), [
    ("file://relative/path", r"file://relative/path names no directory of this machine; expected file:///path"),
    ("file:///", "names no directory"), ("file://me:p@/x", "names no directory"),
    ("file:///x?direct=maybe", "direct of file:///x is 'maybe'; expected auto, yes or no"),
    ("file:///x?threads=0", "threads of file:///x is '0'"), ("file:///x?capacity=lots", "capacity of file:///x is 'lots'"),
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
        with pytest.raises(ConfigError, match=f"file://{path} cannot be used: .*; it must be a directory that"):
            open_and_close(makes(path))
    with pytest.raises(ConfigError, match=r"capacity of file://.* is 64 TiB, but its file system has .*; lower it"):
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

    def refuse(path: Any, flags: int, *more: int) -> int:
        fd = real(path, flags & ~os.O_DIRECT, *more)
        if flags & os.O_DIRECT:  # as Linux does: the file is there all the same
            os.close(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return fd

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        ConfigError, match=r"direct of file://.* is yes, but its file system knows no O_DIRECT; use auto"
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
    monkeypatch.setattr("kvkern.remote.file._RETRY_S", 0.05)
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
        await asyncio.sleep(0.5)  # it connects by itself
        assert await store.put([key_of(1)], [memory.parts(0)], TIMEOUT_S) == [True]
        assert await store.get([key_of(1)], [memory.parts(1)], TIMEOUT_S) == [HIT]
        await store.close()

    asyncio.run(main())
    assert memory.holds(1, memory.parts(0))


def test_rights_follow_the_directory(tmp_path: Path) -> None:
    for name, mode, of_file, of_folder in (("own", 0o700, 0o600, 0o700), ("group", 0o770, 0o660, 0o770)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        bench = Bench(makes(tmp_path / name), count=1, payload_nbytes=8192)
        assert bench.put([key_of(1)], bench.values()) == [True]
        value = file_of(tmp_path / name, 1)
        assert (value.stat().st_mode & 0o777, value.parent.stat().st_mode & 0o777) == (of_file, of_folder)
        bench.close()


def test_reopened(store_path: Path, bench: Bench) -> None:
    keys = [key_of(i) for i in range(4)]
    bench.put(keys, bench.values()[:4])
    other = bench.another()
    assert bench.exists(keys, store=other) == [True] * 4
    assert bench.get(keys, bench.into()[:4], store=other) == [HIT] * 4
    assert all(bench.read(row) for row in range(4))
    wait_for(lambda: other._space.used_nbytes == 4 * VALUE)


# -- the cap -----------------------------------------------------------------------------------------------------------


def test_what_was_not_used_goes_first(store_path: Path) -> None:
    bench = Bench(makes(store_path, f"capacity={10 * VALUE}"), count=10, payload_nbytes=8192)
    keys = [key_of(i) for i in range(30)]
    assert bench.put(keys[:10], bench.values()) == [True] * 10
    for age, number in enumerate(range(10)):  # the last hour: 0 is the oldest
        os.utime(file_of(store_path, number), (0, time.time() - 3600 + age))
    store = bench.another()  # and the first one has never heard of that
    wait_for(lambda: store._space.used_nbytes == 10 * VALUE)
    assert bench.get(keys[2:4], bench.into()[:2], store=store) == [HIT, HIT]
    assert bench.put(keys[10:14], bench.values()[:4], store=store) == [True] * 4
    assert bench.exists(keys[:14], store=store) == [*[False] * 2, *[True] * 2, *[False] * 2, *[True] * 8]
    assert nbytes_in(store_path) == 10 * VALUE
    assert bench.put(keys[14:24], bench.values(), store=store) == [True] * 10
    assert bench.exists(keys[:24], store=store) == [*[False] * 14, *[True] * 10]
    bench.run(store.delete(keys[14:20], TIMEOUT_S))
    assert store._space.used_nbytes == nbytes_in(store_path) == 4 * VALUE
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


WRITER = """
import sys, time
from pathlib import Path
from tests.remote.conformance import Bench, key_of
from tests.remote.test_file import makes
path, first = Path(sys.argv[1]), int(sys.argv[2])
bench = Bench(makes(path, sys.argv[3]), count=2, payload_nbytes=8192)
bench.store._scan_s = 0.1
bench.store._wake.set()
for start in range(first, first + 200, 2):
    assert bench.put([key_of(start), key_of(start + 1)], bench.values(first)) == [True, True]
    time.sleep(0.01)
bench.close()
"""


def test_two_processes_share_a_directory(store_path: Path) -> None:
    """Together they overshoot by no more than what they have not seen of each other, and do not evict for both."""
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
    wait_for(lambda: bench.store._space._complete)
    monkeypatch.setattr(bench.store._space, "_take", lambda: None)
    values = bench.values()
    assert bench.put([key_of(1)], values[:1]) == [True]
    assert bench.put([key_of(2)], values[1:]) == [False]
    bench.store._trouble = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(RemoteError, match=r"cannot be scanned for what to evict \(.*Permission denied"):
        bench.put([key_of(2)], bench.values()[1:])
    bench.close()


# -- crashes and other people's files ------------------------------------------------------------------------------------

CRASH = """
import os, signal, sys
from pathlib import Path
from tests.remote.conformance import Bench, key_of
from tests.remote.test_file import makes
os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
bench = Bench(makes(Path(sys.argv[1])), count=1, payload_nbytes=8192)
bench.put([key_of(1)], bench.values())
"""


def test_killed_between_write_and_rename(store_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASH, str(store_path)], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    (left,) = temporaries_in(store_path)
    assert left.stat().st_size == VALUE
    foreign = [left.parent / ".kvkern-1.tmp", left.parent / "x.tmp", store_path / left.name]
    for path in foreign:
        path.write_text("mine")
        os.utime(path, (0, 0))
    bench = Bench(makes(store_path), count=1, payload_nbytes=8192)
    wait_for(lambda: bench.store._space._complete)
    assert left.exists()  # it may be somebody's who is at it
    assert bench.exists([key_of(1)]) == [False]
    os.utime(left, (0, time.time() - 1000))
    bench.store._wake.set()
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
    older = store_path / "kvkern0" / name[:2] / name  # another version's: counted, and evicted like all
    older.parent.mkdir(parents=True)
    older.write_bytes(bytes(VALUE))
    bench = Bench(makes(store_path, f"capacity={4 * VALUE}"), payload_nbytes=8192)
    wait_for(lambda: bench.store._space._complete)
    assert bench.store._space.used_nbytes == VALUE
    assert bench.put([key_of(i) for i in range(8)], bench.values()) == [True] * 8
    assert len(values_in(store_path)) - 1 == 4 + sum(len(path.name) == 64 for path in foreign[4:])  # 1: the link
    assert not older.exists()
    assert link.is_symlink()
    assert [path.read_text() for path in foreign] == ["mine"] * len(foreign)
    bench.close()


def test_files_that_were_changed(store_path: Path, bench: Bench) -> None:
    keys = [key_of(i) for i in range(5)]
    values = bench.values()
    bench.put(keys, values[:5])
    os.truncate(file_of(store_path, 0), VALUE - 1)
    os.truncate(file_of(store_path, 1), 0)  # as a power cut leaves it
    os.truncate(file_of(store_path, 2), VALUE + 4096)
    file_of(store_path, 3).unlink()
    file_of(store_path, 3).mkdir()
    assert bench.get(keys[:3], bench.into()[:3]) == [WRONG_SIZE] * 3
    assert bench.put(keys[:3], values[5:8]) == [True] * 3  # of another size: replaced
    assert bench.get(keys[:3], bench.into()[:3]) == [HIT] * 3
    assert bench.memory.holds(bench.count, values[5])
    with pytest.raises(RemoteError, match="directory"):
        bench.put(keys[3:4], values[3:4])
    assert temporaries_in(store_path) == []
    assert bench.get(keys[4:], bench.into()[:1]) == [HIT]


def test_replaced_while_it_is_read(store_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader has the old one, whole."""
    values = bench.values()
    bench.put([key_of(1)], values[:1])
    real = os.preadv

    def late(*args: Any) -> int:
        new = store_path / "new"
        new.write_bytes(b"".join(values[1]))
        new.rename(file_of(store_path, 1))
        return real(*args)

    monkeypatch.setattr(os, "preadv", late)
    assert bench.get([key_of(1)], bench.into()[:1]) == [HIT]
    assert bench.read(0)
    assert bench.get([key_of(1)], bench.into()[:1]) == [HIT]
    assert bench.memory.holds(bench.count, values[1])


def test_the_directory_is_removed(store_path: Path, bench: Bench) -> None:
    keys = [key_of(i) for i in range(3)]
    bench.put(keys, bench.values()[:3])
    shutil.rmtree(store_path)
    assert bench.get(keys, bench.into()[:3]) == [MISS] * 3
    assert bench.exists(keys) == [False] * 3
    bench.run(bench.store.delete(keys, TIMEOUT_S))
    assert bench.put(keys, bench.values()[:3]) == [True] * 3
    assert bench.get(keys, bench.into()[:3]) == [HIT] * 3


# -- faults ------------------------------------------------------------------------------------------------------------


class Faulty:
    """os.pwritev or os.preadv that fails now and then."""

    def __init__(self, name: str, code: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real, self._code, self.times = getattr(os, name), code, times
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any) -> int:
        if self.times > 0:
            self.times -= 1
            raise OSError(self._code, os.strerror(self._code))
        return int(self._real(*args))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(store_path: Path, bench: Bench, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for(lambda: bench.store._space._complete)
    faulty = Faulty("pwritev", code, 100, monkeypatch)
    assert bench.put([key_of(0)], bench.values()[:1]) == [False]  # and nothing to evict
    assert temporaries_in(store_path) == []
    faulty.times = 0
    assert bench.put([key_of(i) for i in range(1, 4)], bench.values()[:3]) == [True] * 3
    faulty.times = 1
    assert bench.put([key_of(4)], bench.values()[:1]) == [True]
    assert bench.exists([key_of(i) for i in range(1, 5)]).count(False) == 1  # one has made room
    assert bench.exists([key_of(4)]) == [True]
    assert bench.store._space.used_nbytes == nbytes_in(store_path) == 3 * VALUE
    assert temporaries_in(store_path) == []


def test_faults_of_the_disk(store_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = [key_of(i) for i in range(8)], bench.values()
    with monkeypatch.context() as patch:
        Faulty("pwritev", errno.EIO, 1000, patch)
        with pytest.raises(RemoteError, match=f"file://{store_path}: .*Input/output error"):
            bench.put(keys, values)
    assert temporaries_in(store_path) == values_in(store_path) == []
    assert bench.put(keys, values) == [True] * 8
    assert bench.store._space.used_nbytes == 8 * VALUE
    with monkeypatch.context() as patch:
        Faulty("preadv", errno.EIO, 1, patch)
        with pytest.raises(RemoteError, match="Input/output error"):
            bench.get(keys, bench.into())
    with monkeypatch.context() as patch:
        Faulty("preadv", errno.ESTALE, 1, patch)  # replaced by another node: once is nothing
        assert bench.get(keys[:1], bench.into()[:1]) == [HIT]
        Faulty("preadv", errno.ESTALE, 2, patch)
        with pytest.raises(RemoteError, match="Stale file handle"):
            bench.get(keys[:1], bench.into()[:1])
    assert bench.get(keys, bench.into()) == [HIT] * 8


@pytest.mark.parametrize(("direct", "most"), [("no", 3000), ("auto", 4096)])
def test_transfers_in_pieces(store_path: Path, direct: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(makes(store_path, f"direct={direct}"), count=2, payload_nbytes=8192)
    for name in ("pwritev", "preadv"):
        real = getattr(os, name)

        def short(fd: int, parts: list[memoryview], at: int, real: Any = real) -> int:
            return int(real(fd, [parts[0][:most]], at))

        monkeypatch.setattr(os, name, short)
    assert bench.put([key_of(1)], bench.values()[:1]) == [True]
    assert bench.get([key_of(1)], bench.into()[:1]) == [HIT]
    assert bench.read(0)
    bench.close()


def test_a_slow_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not begun when the time is over does not begin; the call ends with what is under way."""
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *args: (time.sleep(0.2), real(*args))[1])
    start = time.monotonic()
    with pytest.raises(RemoteError, match=r"[0-9] of 8 values in 0.1 s"):
        bench.run(bench.store.put([key_of(i) for i in range(8)], bench.values(), 0.1))
    assert time.monotonic() - start < 1.0
    assert bench.exists([key_of(7)]) == [False]


def test_rights_that_are_lost(store_path: Path, bench: Bench) -> None:
    if os.geteuid() == 0:
        pytest.skip("rights are not tested: this user is root and has them all")
    bench.put([key_of(1)], bench.values()[:1])
    file_of(store_path, 1).chmod(0)
    with pytest.raises(RemoteError, match="Permission denied"):
        bench.get([key_of(1)], bench.into()[:1])
    store_path.joinpath("kvkern1").chmod(0o500)
    with pytest.raises(RemoteError, match="Permission denied"):
        bench.put([key_of(2)], bench.values()[:1])
    store_path.joinpath("kvkern1").chmod(0o700)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a real full disk is not tested: no tmpfs can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], capture_output=True)


def test_a_small_disk(small_disk: Path) -> None:
    bench = Bench(makes(small_disk, "capacity=256KiB"), count=8, payload_nbytes=28 << 10)
    wait_for(lambda: bench.store._space._complete)
    (small_disk / "ballast").write_bytes(bytes(96 << 10))  # somebody else's: the capacity is not to be had
    for start in range(0, 40, 8):
        assert bench.put([key_of(i) for i in range(start, start + 8)], bench.values()).count(True) >= 4
    there = bench.exists([key_of(i) for i in range(40)])
    assert 2 <= there.count(True) <= 5
    assert bench.get([key_of(there.index(True))], bench.into()[:1]) == [HIT]
    assert temporaries_in(small_disk) == []
    bench.close()


def test_a_disk_that_is_unmounted(small_disk: Path) -> None:
    bench = Bench(makes(small_disk), count=2, payload_nbytes=8192)
    assert bench.put([key_of(1)], bench.values()[:1]) == [True]
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    assert bench.get([key_of(1)], bench.into()[:1]) == [MISS]
    with pytest.raises(RemoteError, match="its file system is not mounted any more"):
        bench.put([key_of(2)], bench.values()[1:])
    assert list(small_disk.iterdir()) == []
    bench.close()
