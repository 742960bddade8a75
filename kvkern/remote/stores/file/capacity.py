"""Keeps the values of a directory below a capacity. Knows names, sizes and times of files, never contents.

    root / kvkern<version> / <first 2 hex digits of the key> / <64 hex digits>     a value, of any version of kvkern
                                                             / .kvkern-<16 hex digits>.tmp    a value that is being written
    files with other names are not kvkern's: they are neither counted nor touched

    last use = mtime: a write sets it; a reader that finds it older than REFRESH_S refreshes it

    scan     every file: count its bytes, keep the POOL least recently used; delete leftover temporaries
    room     while counted + reserved > capacity, or reserved > headroom of the disk: take the oldest of the pool
               used since the scan? put it back as the youngest    else unlink it and uncount it

With at most POOL values, the pool holds all of them in order of last use, with the process's own writes. That is exact LRU
up to REFRESH_S. With more values, the scan finds the POOL oldest, which is exact too. The next scan is due when half of the
pool is gone.

Several writers, on any node, share a directory without communicating. Each counts its own writes at once and the writes of
others at its next scan. If a writer needs room and finds the oldest value gone already, it does not count that as room:
another writer has used the room for values not yet seen here. So each writer removes as much as it writes. Together they
stay at the capacity, plus or minus what they wrote between two scans while the directory filled up. If a scan finds an
excess, all writers see the same excess and agree on the oldest values; there a value that is gone counts as removed for all.
The same holds if the disk lacks free space (free_space.py).

Every time comes from the files. Nodes with wrong clocks may share a directory; clock.py says which clock counts.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress

from .clock import FileSystemClock
from .folders import LinkedFolderError, open_folder
from .free_space import FreeSpace
from .leftovers import Leftovers

POOL = 32_768  # values; some 10 MB
REFRESH_S = 60.0
SLACK_NBYTES = (
    256 << 20
)  # the most that is evicted beyond a lack of free space, so that it is not lacking again at once
SETTLE_S = 1.0  # how long nothing is evicted for the disk, after it has gained too little by what was evicted

_OF_ROOT = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_VERSION = re.compile(r"kvkern[0-9]{1,9}")
_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_VALUE = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.kvkern-[0-9a-f]{16}\.tmp")

_Found = list[tuple[int, str, int]]  # last use in ns, name below root, bytes


class DirectoryCapacity:
    """The accounts of one directory. Call `scan` from one thread, and the rest from any thread. Raises OSError."""

    def __init__(
        self,
        root: str,
        capacity_nbytes: int,
        pool: int = POOL,
        disk: FreeSpace | None = None,  # None: the capacity alone counts
        clock: FileSystemClock | None = None,  # None: one that touches `root`
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.closing = False  # set it to end a scan early
        self._root = root
        self._max_pool = pool
        self._disk = disk
        self._clock = clock or FileSystemClock(root)
        self._leftovers = Leftovers(self._clock)
        # One thread at a time: what others wait to reserve does not count, or all would evict all and none would write.
        self._reserving = threading.Lock()
        self._in_vain_until_s = 0.0
        self._lock = threading.Lock()  # protects everything below
        self._unlinked_nbytes = 0  # bytes of all values that this process has removed
        self._pool: OrderedDict[str, tuple[int, int]] = OrderedDict()  # name -> last use, bytes; the oldest first
        self._complete = False  # the pool holds every counted value
        self._counted_nbytes: dict[str, int] = {}  # directory -> bytes
        self._used_nbytes = 0  # the sum of `_counted_nbytes`
        self._reserved_nbytes = 0  # bytes of values that are being written
        self._leaving_nbytes = 0  # bytes of values that are being removed; they are still counted
        # During a scan: the bytes counted so far, the directories still to come, this process's writes since its start.
        self._recounted: dict[str, int] = {}
        self._not_scanned_yet: set[str] = set()
        self._written_since_scan: OrderedDict[str, tuple[int, int]] = OrderedDict()

    @property
    def used_nbytes(self) -> int:
        """Bytes of all values, as far as this process knows."""
        return self._used_nbytes

    @property
    def wants_scan(self) -> bool:
        """True if the pool is half empty but does not hold every value."""
        return not self._complete and len(self._pool) < self._max_pool // 2

    # -- by writers ----------------------------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> bool:
        """Make room for a value that will be written. Returns False if there is no room now."""
        if nbytes > self.capacity_nbytes:
            return False
        with self._reserving:
            with self._lock:
                self._reserved_nbytes += nbytes
            has_room = False
            try:
                has_room = self._trim(for_all=False) and self._leave_free()
            finally:
                if not has_room:
                    self.release(nbytes)
        return has_room

    def release(self, nbytes: int) -> None:
        """Undo `reserve`: the value was not written."""
        with self._lock:
            self._reserved_nbytes -= nbytes

    def wrote(
        self,
        name: str,
        nbytes: int,
        replaced_nbytes: int,  # of the value that had this name before, as far as the caller knows
    ) -> None:
        """Count a reserved value that was written."""
        entry = self._last_use(name), nbytes
        if self._disk is not None:
            self._disk.wrote(nbytes)
        with self._lock:
            self._reserved_nbytes -= nbytes
            counted = self._written_since_scan.get(name) or self._pool.get(name)
            if counted is not None or self._complete:
                replaced_nbytes = 0 if counted is None else counted[1]
            self._add_nbytes(name, nbytes - replaced_nbytes)
            self._put_youngest(self._written_since_scan, name, entry)
            if self._complete:
                self._complete = self._put_youngest(self._pool, name, entry)

    def removed(self, name: str, nbytes: int) -> None:
        """Uncount a value that is gone."""
        with self._lock:
            self._pool.pop(name, None)
            self._written_since_scan.pop(name, None)
            self._add_nbytes(name, -nbytes)

    def trim(self) -> bool:
        """Evict the excess over the capacity that a scan has found. Returns False if too few candidates are left."""
        return self._trim(for_all=True)

    def evict(self, nbytes: int) -> bool:
        """Free `nbytes` of the disk, at least 1/64 of all values, whatever the capacity is. False: nothing was evicted."""
        return self._evict(max(nbytes, self._used_nbytes // 64), for_all=False) > 0

    def leave_free(self) -> bool:
        """Evict until the disk has free what is kept for others, beside what is being written. False: it has not.

        If the disk has gained too little by what was evicted, nothing is evicted for SETTLE_S: some file systems give back
        the bytes of removed files late.
        """
        with self._reserving:
            return self._leave_free()

    def room_nbytes(self) -> int:
        """Return how many bytes all values may take now, whatever the capacity is."""
        return 1 << 62 if self._disk is None else max(0, self._used_nbytes - self._lacking_nbytes(self._disk))

    def _leave_free(self) -> bool:
        if self._disk is None or self._lacking_nbytes(self._disk) <= 0:
            return True
        # What is being written may count twice: it is reserved, and a part of it is on the disk already.
        enough_nbytes = self._unlinked_nbytes + self._lacking_nbytes(self._disk) + self._reserved_nbytes
        while (lacking := self._lacking_nbytes(self._disk)) > 0:
            if self._unlinked_nbytes >= enough_nbytes:
                self._in_vain_until_s = time.monotonic() + SETTLE_S
            if time.monotonic() < self._in_vain_until_s:
                return False
            if not self._evict(max(lacking, min(SLACK_NBYTES, self._used_nbytes // 64)), for_all=True):
                return False
        return True

    def _lacking_nbytes(self, disk: FreeSpace) -> int:
        return self._reserved_nbytes - disk.headroom(self._reserved_nbytes)

    def _evict(self, goal_nbytes: int, for_all: bool) -> int:
        freed = 0
        while freed < goal_nbytes:
            with self._lock:
                victim = self._pop_oldest()
            if victim is None:
                break
            freed += self._remove_value(*victim, for_all)
        return freed

    def _trim(self, for_all: bool) -> bool:
        while True:
            with self._lock:
                if self._used_nbytes + self._reserved_nbytes - self._leaving_nbytes <= self.capacity_nbytes:
                    return True
                victim = self._pop_oldest()
            if victim is None:
                return False
            self._remove_value(*victim, for_all)

    def _pop_oldest(self) -> tuple[str, int, int] | None:
        if not self._pool:
            if self._used_nbytes > self._leaving_nbytes:
                self._complete = False  # some counted values are no longer where they were
            return None
        name, (last_use, nbytes) = self._pool.popitem(last=False)
        self._leaving_nbytes += nbytes
        return name, last_use, nbytes

    def _remove_value(self, name: str, last_use: int, nbytes: int, for_all: bool) -> int:
        """Remove a value. Returns the bytes freed: 0 if it was used meanwhile, or if this user may not remove it.

        A value that another writer has removed counts as freed only with `for_all`.
        """
        directory, _, file = name.rpartition("/")
        try:
            try:
                folder = open_folder(self._root, directory)
                try:
                    now = os.lstat(file, dir_fd=folder)
                    if now.st_mtime_ns > last_use:
                        with self._lock:
                            self._complete &= self._put_youngest(self._pool, name, (now.st_mtime_ns, now.st_size))
                        return 0
                    os.unlink(file, dir_fd=folder)
                finally:
                    os.close(folder)
                with self._lock:
                    self._unlinked_nbytes += nbytes
            except FileNotFoundError:
                if not for_all:
                    return 0
            except (PermissionError, IsADirectoryError, NotADirectoryError):  # of another user, in a sticky folder
                return 0
            except OSError:
                self._complete = False  # it is no longer in the pool, and may still be there
                raise
            self.removed(name, nbytes)
        finally:
            with self._lock:
                self._leaving_nbytes -= nbytes
        return nbytes

    def _last_use(self, name: str) -> int:
        """Return the time of a value that was written just now."""
        try:
            return os.lstat(f"{self._root}/{name}").st_mtime_ns
        except OSError:
            return 0  # another writer has removed it already, or its time cannot be read: eviction looks again

    def _put_youngest(self, pool: OrderedDict[str, tuple[int, int]], name: str, entry: tuple[int, int]) -> bool:
        if name not in pool and len(pool) >= self._max_pool:
            return False
        pool[name] = entry
        pool.move_to_end(name)
        return True

    def _add_nbytes(self, name: str, nbytes: int) -> None:
        directory = name.rpartition("/")[0]
        before = self._counted_nbytes.get(directory, 0)
        self._counted_nbytes[directory] = max(0, before + nbytes)
        self._used_nbytes += self._counted_nbytes[directory] - before
        if directory not in self._not_scanned_yet:  # the scan has passed it, or none is under way
            self._recounted[directory] = max(0, self._recounted.get(directory, 0) + nbytes)

    # -- by the scan ---------------------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Count all values and find the least recently used ones."""
        directories = list(self._directories())
        self._clock.measure()
        self._leftovers.begin_scan()
        with self._lock:
            self._recounted, self._not_scanned_yet, self._written_since_scan = {}, set(directories), OrderedDict()
        found: _Found = []
        dropped = 0
        for directory in directories:
            if self.closing:
                return
            nbytes = self._scan_directory(directory, found)
            with self._lock:
                self._recounted[directory] = nbytes
                self._not_scanned_yet.discard(directory)
            if len(found) > 2 * self._max_pool:
                dropped += self._keep_oldest(found)
        dropped += self._keep_oldest(found)
        with self._lock:
            self._pool = OrderedDict((name, (last_use, nbytes)) for last_use, name, nbytes in found)
            self._complete = not dropped and len(self._written_since_scan) < self._max_pool
            if self._complete:
                for name, entry in self._written_since_scan.items():
                    self._complete &= self._put_youngest(self._pool, name, entry)
            self._counted_nbytes = self._recounted
            self._used_nbytes = sum(self._counted_nbytes.values())
            self._recounted, self._written_since_scan = {}, OrderedDict()

    def _keep_oldest(self, found: _Found) -> int:
        found.sort()
        dropped = max(0, len(found) - self._max_pool)
        del found[self._max_pool :]
        return dropped

    def _directories(self) -> Iterator[str]:
        for version in self._subfolders("", _VERSION):
            yield from self._subfolders(version, _FAN_OUT)

    def _subfolders(self, directory: str, names: re.Pattern[str]) -> list[str]:
        """Return the folders in the root ("") or in one of its folders that have such a name. A link is none."""
        with suppress(FileNotFoundError, LinkedFolderError), _Listing(self._root, directory) as entries:
            return [
                f"{directory}/{entry.name}".lstrip("/")
                for entry in entries
                if names.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
        return []

    def _scan_directory(self, directory: str, found: _Found) -> int:
        total = 0
        digits = directory.rpartition("/")[2]
        now_ns = self._clock.now_ns()
        with suppress(FileNotFoundError, LinkedFolderError), _Listing(self._root, directory) as entries:
            for entry in entries:
                is_value = bool(_VALUE.fullmatch(entry.name)) and entry.name.startswith(digits)
                if not (is_value or _TEMPORARY.fullmatch(entry.name)) or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(FileNotFoundError):
                    known = entry.stat(follow_symlinks=False)
                    name = f"{directory}/{entry.name}"
                    if is_value:
                        total += known.st_size
                        last_use = self._believed(entry.name, entries.fd, known, now_ns)
                        found.append((last_use, name, known.st_size))
                    elif self._leftovers.is_leftover(name, known):
                        with suppress(OSError):  # the next scan tries again
                            os.unlink(entry.name, dir_fd=entries.fd)
        return total

    def _believed(self, file: str, folder: int, known: os.stat_result, now_ns: int | None) -> int:
        """Return the last use of a value. A time ahead of the file system's clock is set right: it would never grow old."""
        if now_ns is None or known.st_mtime_ns <= now_ns + REFRESH_S * 1e9:
            return known.st_mtime_ns
        with suppress(OSError):  # the file of another user, or a full disk
            os.utime(file, dir_fd=folder, follow_symlinks=False)
            return os.lstat(file, dir_fd=folder).st_mtime_ns
        return now_ns


class _Listing:
    """The entries of the root ("") or of a folder below it, while the block runs. Raises OSError."""

    def __init__(self, root: str, directory: str) -> None:
        self.fd = open_folder(root, directory, os.O_RDONLY) if directory else os.open(root, _OF_ROOT)

    def __enter__(self) -> _Listing:
        return self

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.fd) as entries:
            yield from entries

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)
