"""How much the values of a directory take, and which of them go first. Knows names, sizes and times, never contents.

    root / kvkern<version> / <first 2 hex digits of the key> / <64 hex digits>     a value, of any version of kvkern
                                                             / .kvkern-<16 hex digits>.tmp    one that is being written
    whatever has another name is not ours: it is neither counted nor touched

    last use = mtime: set by the write, refreshed by a reader that finds it older than REFRESH_S

    scan     every file: count its bytes, keep the POOL least recently used; leftover temporaries go
    room     while counted + reserved > capacity: take the oldest of the pool
               used since the scan? back to the young end    else unlink it and uncount it

With at most POOL values the pool is all of them in order of last use, own writes included: exact LRU to REFRESH_S. With
more, the scan finds the POOL oldest, which is exact as well, and the next scan is due when half of them are gone.

Several writers, of any node, share a directory without talking. Each counts its own writes at once and those of others
at its next scan. One that needs room and finds the oldest gone does not count that as room: another has taken it for
values not yet seen here. So each removes as much as it writes, and together they stay at the capacity, give or take what
they wrote between two scans while it filled up. An excess that a scan finds is there for all to see: they agree on which
values are the oldest, and one that is gone has been removed for everybody.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress

POOL = 32_768  # values; some 10 MB
REFRESH_S = 60.0
LEFTOVER_S = 900.0  # a temporary this old has no writer any more

_VERSION = re.compile(r"kvkern[0-9]{1,9}")
_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_VALUE = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.kvkern-[0-9a-f]{16}\.tmp")

_Found = list[tuple[int, str, int]]  # last use in ns, name below root, bytes


class DirectoryCapacity:
    """Accounts of one directory. Called from many threads; `scan` from one. Raises OSError."""

    def __init__(self, root: str, capacity_nbytes: int, pool: int = POOL) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.closing = False  # set: a scan ends early
        self._root = root
        self._max_pool = pool
        self._lock = threading.Lock()
        self._pool: OrderedDict[str, tuple[int, int]] = OrderedDict()  # name: last use, bytes; the oldest first
        self._complete = False  # the pool holds every value that is counted
        self._counted: dict[str, int] = {}  # directory: bytes
        self._used = 0  # their sum
        self._reserved = 0  # of values that are being written
        self._leaving = 0  # of values that are being removed, which are counted still
        # While a scan is under way: what it has counted so far, what is still to come, own writes since its start.
        self._fresh: dict[str, int] = {}
        self._to_come: set[str] = set()
        self._since: OrderedDict[str, tuple[int, int]] = OrderedDict()

    @property
    def used_nbytes(self) -> int:
        """As far as this process knows."""
        return self._used

    @property
    def wants_scan(self) -> bool:
        """The candidates run out before the values do."""
        return not self._complete and len(self._pool) < self._max_pool // 2

    # -- by writers ----------------------------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> bool:
        """Make room for a value that is about to be written, or say that there is none now."""
        with self._lock:
            self._reserved += nbytes
        if nbytes <= self.capacity_nbytes and self._trim(for_all=False):
            return True
        self.release(nbytes)
        return False

    def release(self, nbytes: int) -> None:
        """A reserved value was not written."""
        with self._lock:
            self._reserved -= nbytes

    def wrote(
        self,
        name: str,
        nbytes: int,
        replaced_nbytes: int,  # of the value that had this name, as far as the caller has seen
    ) -> None:
        """A reserved value is there."""
        entry = time.time_ns(), nbytes
        with self._lock:
            self._reserved -= nbytes
            counted = self._since.get(name) or self._pool.get(name)
            if counted is not None or self._complete:
                replaced_nbytes = 0 if counted is None else counted[1]
            self._count(name, nbytes - replaced_nbytes)
            self._young(self._since, name, entry)
            if self._complete:
                self._complete = self._young(self._pool, name, entry)

    def removed(self, name: str, nbytes: int) -> None:
        """A value is not there any more."""
        with self._lock:
            self._pool.pop(name, None)
            self._since.pop(name, None)
            self._count(name, -nbytes)

    def trim(self) -> bool:
        """Evict what a scan has found to be above the capacity; False if that much cannot be found."""
        return self._trim(for_all=True)

    def evict(self, nbytes: int) -> bool:
        """Make the disk less full, whatever the capacity says: by this much or some of the whole. False: nothing to evict."""
        goal, freed = max(nbytes, self._used // 64), 0
        while freed < goal:
            with self._lock:
                victim = self._take()
            if victim is None:
                break
            freed += self._drop(*victim, for_all=False)
        return freed > 0

    def _trim(self, for_all: bool) -> bool:
        while True:
            with self._lock:
                if self._used + self._reserved - self._leaving <= self.capacity_nbytes:
                    return True
                victim = self._take()
            if victim is None:
                return False
            self._drop(*victim, for_all)

    def _take(self) -> tuple[str, int, int] | None:
        if not self._pool:
            self._complete = False  # what is still counted is not where it was
            return None
        name, (last_use, nbytes) = self._pool.popitem(last=False)
        self._leaving += nbytes
        return name, last_use, nbytes

    def _drop(self, name: str, last_use: int, nbytes: int, for_all: bool) -> int:
        """Bytes less: none if it was used meanwhile, or has gone for somebody else's values."""
        path = f"{self._root}/{name}"
        try:
            try:
                now = os.lstat(path)
                if now.st_mtime_ns > last_use:
                    with self._lock:
                        self._complete &= self._young(self._pool, name, (now.st_mtime_ns, now.st_size))
                    return 0
                os.unlink(path)
            except FileNotFoundError:
                if not for_all:
                    return 0
            self.removed(name, nbytes)
        finally:
            with self._lock:
                self._leaving -= nbytes
        return nbytes

    def _young(self, pool: OrderedDict[str, tuple[int, int]], name: str, entry: tuple[int, int]) -> bool:
        if name not in pool and len(pool) >= self._max_pool:
            return False
        pool[name] = entry
        pool.move_to_end(name)
        return True

    def _count(self, name: str, nbytes: int) -> None:
        directory = name.rpartition("/")[0]
        before = self._counted.get(directory, 0)
        self._counted[directory] = max(0, before + nbytes)
        self._used += self._counted[directory] - before
        if directory not in self._to_come:  # the scan has been there, or will not come
            self._fresh[directory] = max(0, self._fresh.get(directory, 0) + nbytes)

    # -- by the scan ---------------------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Count what is there and find the least recently used."""
        directories = list(self._directories())
        with self._lock:
            self._fresh, self._to_come, self._since = {}, set(directories), OrderedDict()
        found: _Found = []
        dropped = 0
        for directory in directories:
            if self.closing:
                return
            nbytes = self._scan_directory(directory, found)
            with self._lock:
                self._fresh[directory] = nbytes
                self._to_come.discard(directory)
            if len(found) > 2 * self._max_pool:
                dropped += self._keep_oldest(found)
        dropped += self._keep_oldest(found)
        with self._lock:
            self._pool = OrderedDict((name, (last_use, nbytes)) for last_use, name, nbytes in found)
            self._complete = not dropped and len(self._since) < self._max_pool
            if self._complete:
                for name, entry in self._since.items():
                    self._complete &= self._young(self._pool, name, entry)
            self._counted = self._fresh
            self._used = sum(self._counted.values())
            self._fresh, self._since = {}, OrderedDict()

    def _keep_oldest(self, found: _Found) -> int:
        found.sort()
        dropped = max(0, len(found) - self._max_pool)
        del found[self._max_pool :]
        return dropped

    def _directories(self) -> Iterator[str]:
        for version in _listed(self._root):
            if _VERSION.fullmatch(version.name) and version.is_dir(follow_symlinks=False):
                for fan_out in _listed(version.path):
                    if _FAN_OUT.fullmatch(fan_out.name) and fan_out.is_dir(follow_symlinks=False):
                        yield f"{version.name}/{fan_out.name}"

    def _scan_directory(self, directory: str, found: _Found) -> int:
        total = 0
        digits = directory.rpartition("/")[2]
        for entry in _listed(f"{self._root}/{directory}"):
            is_value = bool(_VALUE.fullmatch(entry.name)) and entry.name.startswith(digits)
            if not (is_value or _TEMPORARY.fullmatch(entry.name)) or not entry.is_file(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError):
                known = entry.stat(follow_symlinks=False)
                if is_value:
                    total += known.st_size
                    found.append((known.st_mtime_ns, f"{directory}/{entry.name}", known.st_size))
                elif time.time() - known.st_mtime > LEFTOVER_S:
                    os.unlink(entry.path)
        return total


def _listed(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            yield from entries
    except FileNotFoundError:
        return
