"""Files of the directory store: changed, removed, in pieces, on disks that fail or are full, slow or gone."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from kvkern.remote.stores.base import RemoteError
from tests.remote.stores.conformance import HIT, MISS, TIMEOUT_S, UNKNOWN, WRONG_SIZE, Bench, key_of
from tests.remote.stores.file import files
from tests.remote.stores.file.files import VALUE, file_of, makes, nbytes_in, temporaries_in, values_in, wait_for

store_path, bench, small_disk = files.store_path, files.bench, files.small_disk


def test_rights_follow_the_directory(tmp_path: Path) -> None:
    for name, mode, of_file, of_folder in (("own", 0o700, 0o600, 0o700), ("group", 0o770, 0o660, 0o770)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        bench = Bench(makes(tmp_path / name), count=1, payload_nbytes=8192)
        assert bench.put([key_of(1)], bench.values()) == [True]
        value = file_of(tmp_path / name, 1)
        assert (value.stat().st_mode & 0o777, value.parent.stat().st_mode & 0o777) == (of_file, of_folder)
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
    assert bench.put(keys[:3], values[5:8]) == [True] * 3  # of another size: it is replaced
    assert bench.get(keys[:3], bench.into()[:3]) == [HIT] * 3
    assert bench.memory.holds(bench.count, values[5])
    assert bench.put(keys[3:5], values[3:5]) == [False, True]  # it cannot be replaced, and costs no other value
    assert bench.get(keys[3:4], bench.into()[:1]) == [MISS]
    assert bench.exists(keys[3:5]) == [False, True]
    assert temporaries_in(store_path) == []
    assert bench.get(keys[4:], bench.into()[:1]) == [HIT]


def test_replaced_while_it_is_read(store_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader has the old value, whole."""
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
    wait_for(lambda: bench.store._capacity._complete)
    faulty = Faulty("pwritev", code, 100, monkeypatch)
    assert bench.put([key_of(0)], bench.values()[:1]) == [False]  # there is nothing to evict
    assert temporaries_in(store_path) == []
    faulty.times = 0
    assert bench.put([key_of(i) for i in range(1, 4)], bench.values()[:3]) == [True] * 3
    faulty.times = 1
    assert bench.put([key_of(4)], bench.values()[:1]) == [True]
    assert bench.exists([key_of(i) for i in range(1, 5)]).count(False) == 1  # one value has made room
    assert bench.exists([key_of(4)]) == [True]
    assert bench.store._capacity.used_nbytes == nbytes_in(store_path) == 3 * VALUE
    assert temporaries_in(store_path) == []


def test_faults_of_the_disk(store_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = [key_of(i) for i in range(8)], bench.values()
    with monkeypatch.context() as patch:
        Faulty("pwritev", errno.EIO, 1000, patch)
        with pytest.raises(RemoteError, match=f"file://{store_path}: .*Input/output error"):
            bench.put(keys, values)
    assert temporaries_in(store_path) == values_in(store_path) == []
    assert bench.put(keys, values) == [True] * 8
    assert bench.store._capacity.used_nbytes == 8 * VALUE
    with monkeypatch.context() as patch:
        Faulty("preadv", errno.EIO, 1000, patch)
        with pytest.raises(RemoteError, match="Input/output error"):
            bench.get(keys, bench.into())
    with monkeypatch.context() as patch:
        Faulty("preadv", errno.ESTALE, 1, patch)  # replaced by another node: once is no fault
        assert bench.get(keys[:1], bench.into()[:1]) == [HIT]
        Faulty("preadv", errno.ESTALE, 2, patch)
        with pytest.raises(RemoteError, match="Stale file handle"):
            bench.get(keys[:1], bench.into()[:1])
    assert bench.get(keys, bench.into()) == [HIT] * 8


def test_one_file_of_many_that_fails(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers before the failed key are valid. That key and the keys behind it are unknown."""
    bench = Bench(makes(store_path, "threads=1"), payload_nbytes=8192)
    keys, values = [key_of(i) for i in range(8)], bench.values()
    assert bench.put(keys, values) == [True] * 8
    file_of(store_path, 6).unlink()
    real = os.open

    def broken(path: Any, *more: int, **named: Any) -> int:
        if path == key_of(3).hex():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *more, **named)

    monkeypatch.setattr(os, "open", broken)
    assert bench.get(keys, bench.into()) == [HIT] * 3 + [UNKNOWN] * 5
    assert all(bench.read(row) for row in range(3))
    assert bench.get([*keys[4:], keys[3]], bench.into()[:5]) == [HIT, HIT, MISS, MISS, MISS]  # not read: behind a miss
    assert bench.put(keys[:5], values[:5]) == [True] * 3 + [None] * 2
    with pytest.raises(RemoteError, match="Input/output error"):
        bench.get(keys[3:5], bench.into()[:2])
    bench.close()


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
    """Rows that have not begun when the time is over do not begin. The call ends with the rows under way."""
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *args: (time.sleep(0.2), real(*args))[1])
    start = time.monotonic()
    taken = list(bench.run(bench.store.put([key_of(i) for i in range(8)], bench.values(), 0.1)))
    assert set(taken) == {True, None}
    assert taken[7] is None
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


def test_a_small_disk(small_disk: Path) -> None:
    bench = Bench(makes(small_disk, "capacity=256KiB"), count=8, payload_nbytes=28 << 10)
    wait_for(lambda: bench.store._capacity._complete)
    (small_disk / "ballast").write_bytes(bytes(96 << 10))  # of another program: kvkern cannot use its full capacity
    for start in range(0, 40, 8):
        # The room holds four values. How many are written at a time, and then evicted for the next, is the threads' affair.
        assert bench.put([key_of(i) for i in range(start, start + 8)], bench.values()).count(True) >= 2
    there = bench.exists([key_of(i) for i in range(40)])
    assert 2 <= there.count(True) <= 5
    assert bench.get([key_of(there.index(True))], bench.into()[:1]) == [HIT]
    assert temporaries_in(small_disk) == []
    bench.close()


def test_a_disk_that_is_unmounted(small_disk: Path) -> None:
    bench = Bench(makes(small_disk), count=2, payload_nbytes=8192)
    assert bench.put([key_of(1)], bench.values()[:1]) == [True]
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    for call in (
        lambda: bench.exists([key_of(1)]),  # no key counts as absent: nothing is known
        lambda: bench.get([key_of(1)], bench.into()[:1]),
        lambda: bench.put([key_of(2)], bench.values()[1:]),
    ):
        with pytest.raises(RemoteError, match="its file system is not mounted any more"):
            call()
    assert list(small_disk.iterdir()) == []
    bench.close()
