"""A directory as a store: an NVMe drive of this node, or a file system that every node mounts.

    file:///path?capacity=1TiB&direct=auto&threads=4&sync=no&scan_s=60

capacity   of all values together, default half of the file system; what goes first: file_space.py
direct     O_DIRECT: `auto` where the file system takes it, `yes` insists, `no` never. Past the page cache a value is moved
           by the drive alone: no copy, a fraction of the CPU time, no dirty pages for the kernel to throttle writers by, and
           nothing of the engines' own files is pushed out of memory. What is asked for twice is kept by the tier above.
           Values whose memory or size is no multiple of 4 KiB go through the page cache all the same.
threads    for reads, as many again for writes: what is written behind does not hold up what a prompt waits for
sync       fdatasync before the rename. Without it, a power cut or kernel crash (not a crash of kvkern) may leave values of
           the last half minute short, empty, or with holes of zeros, under their right names. A wrong size is WRONG_SIZE;
           for the rest the tier verifies every value's checksums: it is a miss and is deleted. Never wrong bytes
scan_s     the least time between two scans; one that takes long is repeated after twenty times as long

Files are for their owner (0600); where the directory itself gives rights to its group, so do they. A file system that
hangs, as a hard NFS mount does when its server is gone, holds the threads and with them the call, beyond its time: mount
such a one `soft`.
"""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ....config import format_nbytes
from ....errors import ConfigError
from ..base import Got, Parts, RemoteError, answered, answered_get
from ..blocking_calls import BlockingCalls
from ..url import RemoteUrl
from .capacity import DirectoryCapacity
from .value_files import ValueFolder, file_name

_STATS_A_THREAD = 32  # what a second thread for `exists` is worth
_RETRY_S = 5.0  # until a directory that could not be scanned is tried again


def make(url: RemoteUrl) -> FileStore:
    """Raises ConfigError for an option that is none."""
    url.check_options("capacity", "direct", "threads", "sync", "scan_s")
    if url.host or url.port or url.user or url.password or not url.path.strip("/"):
        raise ConfigError(f"{url} names no directory of this machine; expected file:///path/of/a/directory")
    direct = url.text("direct", "auto")
    if direct not in ("auto", "yes", "no"):
        raise ConfigError(f"direct of {url} is {direct!r}; expected auto, yes or no")
    return FileStore(
        url.path.rstrip("/"),
        url.nbytes("capacity", 0),
        direct,
        url.integer("threads", 4, 1, 256),
        url.flag("sync", False),
        url.integer("scan_s", 60, 1, 86_400),
    )


class FileStore:
    """`RemoteStore` over a directory. Made by `make`."""

    def __init__(
        self,
        root: str,
        capacity_nbytes: int,  # 0: half of the file system
        direct: str,  # auto, yes, no
        threads: int,
        sync: bool,
        scan_s: float,
    ) -> None:
        self._root = root
        self._capacity_nbytes = capacity_nbytes
        self._num_threads = threads
        self._scan_s = scan_s
        self._folder = ValueFolder(root, direct, sync)
        self._readers = BlockingCalls(threads, "file-get")
        self._writers = BlockingCalls(threads, "file-put")
        self._lookers = BlockingCalls(threads, "file-stat")
        self._prepare_lock = threading.Lock()
        self._space: DirectoryCapacity | None = None  # from when the directory has been reached
        self._trouble: OSError | ConfigError | None = None  # of the last scan
        self._closed, self._wake = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="kvkern-file-scan", daemon=True)

    async def open(self) -> None:
        try:
            await self._lookers.run(self._prepare)
        except ConfigError:
            await self.close()
            raise
        except OSError as error:
            self._trouble = error
            raise RemoteError(f"file://{self._root}: {error}") from error
        finally:
            if not self._closed.is_set():
                self._watcher.start()

    async def close(self) -> None:
        self._closed.set()
        self._wake.set()
        if self._space is not None:
            self._space.closing = True
        for threads in (self._readers, self._writers, self._lookers):
            threads.close()
        if self._watcher.is_alive():
            self._watcher.join(_RETRY_S)  # a daemon: a file system that hangs keeps no process alive

    async def register(self, memory: memoryview) -> None:
        pass

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool | None]:
        there: list[bool | None] = [None] * len(keys)

        def look(row: int) -> None:
            found = self._folder.size(file_name(keys[row])) is not None
            if not found and False not in there:
                self._folder.check_root()  # below the mount point of what is gone nothing is found
            there[row] = found

        errors = await self._each(self._lookers, len(keys), look, timeout_s, -(-len(keys) // _STATS_A_THREAD))
        return answered(there, errors)

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        got: list[Got | None] = [None] * len(keys)
        end = len(keys)  # the first miss

        def read(row: int) -> None:
            nonlocal end
            if row < end:
                outcome = self._folder.read(file_name(keys[row]), into[row])
                if outcome is Got.MISS:
                    self._folder.check_root()
                    end = min(end, row)
                got[row] = outcome

        return answered_get(got, await self._each(self._readers, len(keys), read, timeout_s))

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool | None]:
        taken: list[bool | None] = [None] * len(keys)

        def write(row: int) -> None:
            taken[row] = self._write(file_name(keys[row]), values[row])

        errors = await self._each(self._writers, len(keys), write, timeout_s)
        if self._space is not None and self._space.wants_scan:
            self._wake.set()
        return answered(taken, errors)

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        for error in await self._each(
            self._writers, len(keys), lambda row: self._remove(file_name(keys[row])), timeout_s
        ):
            raise error

    async def _each(
        self,
        threads: BlockingCalls,
        count: int,
        call: Callable[[int], None],  # raises OSError
        timeout_s: float,
        at_most: int = 1 << 30,  # threads
    ) -> list[RemoteError]:
        """`call` for each row, in order, several at a time, until one fails. Returns when none is under way any more."""
        deadline = time.monotonic() + timeout_s
        rows = deque(range(count))

        def work() -> None:
            while True:
                try:
                    row = rows.popleft()
                except IndexError:
                    return
                try:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{row} of {count} values in {timeout_s:.1f} s")
                    call(row)
                except OSError as error:
                    rows.clear()
                    raise RemoteError(f"file://{self._root}: {error}") from error

        workers = (threads.run(work) for _ in range(min(self._num_threads, count, at_most)))
        errors = []
        for outcome in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(outcome, RemoteError):
                errors.append(outcome)
            elif outcome is not None:
                raise outcome
        return errors

    def _write(self, name: str, value: Parts) -> bool:
        space, nbytes = self._space, len(value[0]) + len(value[1])
        if space is None:
            raise OSError(errno.ENODEV, f"not reached yet ({self._trouble})", self._root)
        there = self._folder.size(name)
        if there == nbytes and self._folder.touch(name):
            return True
        if not space.reserve(nbytes):
            if self._trouble is not None:
                raise OSError(errno.EIO, f"cannot be scanned for what to evict ({self._trouble})", self._root)
            return False
        written = False
        try:
            written = self._folder.create(name, value) or (space.evict(nbytes) and self._folder.create(name, value))
        finally:
            if written:
                space.wrote(name, nbytes, there or 0)
            else:
                space.release(nbytes)
        return written

    def _remove(self, name: str) -> None:
        nbytes = self._folder.remove(name)
        if nbytes is not None and self._space is not None:
            self._space.removed(name, nbytes)

    def _prepare(self) -> None:
        """See that the directory is there and what it can do. Raises ConfigError, or OSError if nobody can tell now."""
        with self._prepare_lock:
            if self._space is not None:
                return
            disk_nbytes = self._folder.prepare()
            if self._capacity_nbytes > disk_nbytes:
                raise ConfigError(
                    f"capacity of file://{self._root} is {format_nbytes(self._capacity_nbytes)}, but its file system has "
                    f"{format_nbytes(disk_nbytes)}; lower it"
                )
            self._space = DirectoryCapacity(self._root, self._capacity_nbytes or disk_nbytes // 2)

    def _watch(self) -> None:
        """Scan now and again, on a thread of its own."""
        while True:
            start = time.monotonic()
            gap_s = self._scan_s
            try:
                self._prepare()
                if self._space is not None:
                    self._space.scan()
                    self._space.trim()
                self._trouble = None
            except (OSError, ConfigError) as error:  # `put` reports it if it matters; it may pass
                self._trouble = error
                gap_s = _RETRY_S
            took_s = time.monotonic() - start
            if self._closed.wait(took_s):
                return
            self._wake.wait(max(gap_s, 20 * took_s))
            self._wake.clear()
            if self._closed.is_set():
                return
