"""A directory as a store: an NVMe drive of this node, or a file system that every node mounts.

    file:///path?capacity=1TiB&keep_free_percent=5&direct=auto&threads=4&sync=no&scan_s=60

capacity   of all values together, default half of the file system; capacity.py says which values go first
keep_free_percent
           of the file system, left free for others, whatever the capacity is; free_space.py has the floor. A thread looks
           every WATCH_S, so that kvkern makes room also if only others write
direct     O_DIRECT: `auto` where the file system allows it, `yes` insists, `no` never. Past the page cache the drive alone
           moves a value: no copy, a fraction of the CPU time, no dirty pages for which the kernel throttles writers, and
           the engines' own files stay in memory. The tier above keeps chunks that are asked for twice. Values whose
           memory or size is not a multiple of 4 KiB still go through the page cache.
threads    for reads, and as many again for writes, so that write-behind does not delay a read that a prompt waits for
sync       fdatasync before the rename. Without it, a power cut or kernel crash (not a crash of kvkern) may leave values of
           the last half minute short, empty, or with holes of zeros, under their right names. A wrong size is WRONG_SIZE.
           For the others the tier verifies checksums: such a value is a miss and is deleted. It never gives wrong bytes.
scan_s     the least time between two scans; after a long scan the next one waits twenty times as long as it took

Only the owner may read the files (0600). If the directory itself gives rights to its group, its files do too. No link below
the directory is followed, and no file of a user without rights there is read (folders.py, value_files.py). If a file
system hangs, as a hard NFS mount does when its server is gone, it holds the threads and the call beyond the timeout.
Mount such file systems `soft`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from ....config import format_nbytes
from ....errors import ConfigError
from ..base import Got, Parts, RemoteError, checked_answers, checked_get_answers
from ..blocking_calls import BlockingCalls
from ..url import RemoteUrl
from .capacity import DirectoryCapacity
from .free_space import PERCENT, FreeSpace
from .value_files import InTheWayError, ValueFolder, file_name

logger = logging.getLogger("kvkern")

_STATS_A_THREAD = 32  # rows per thread of `exists`: fewer are not worth another thread
_RETRY_S = 5.0  # seconds until a failed scan is tried again
WATCH_S = 1.0  # how often kvkern looks whether others have filled the disk


def make(url: RemoteUrl) -> FileStore:
    """Make the store of a URL. Raises ConfigError for a wrong URL or option."""
    url.check_options("capacity", "keep_free_percent", "direct", "threads", "sync", "scan_s")
    if url.host or url.port or url.user or url.password or not url.path.strip("/"):
        raise ConfigError(f"{url} does not name a directory of this machine. Say file:///path/of/a/directory")
    direct = url.text("direct", "auto")
    if direct not in ("auto", "yes", "no"):
        raise ConfigError(f"direct of {url} is {direct!r}. Give auto, yes or no")
    return FileStore(
        url.path.rstrip("/"),
        url.nbytes("capacity", 0),
        url.integer("keep_free_percent", PERCENT, 0, 90),
        direct,
        url.integer("threads", 4, 1, 256),
        url.flag("sync", False),
        url.integer("scan_s", 60, 1, 86_400),
    )


class FileStore:
    """`RemoteStore` over a directory. Use `make`."""

    def __init__(
        self,
        root: str,
        capacity_nbytes: int,  # 0: half of the file system
        keep_free_percent: int,  # of the file system
        direct: str,  # auto, yes, no
        threads: int,
        sync: bool,
        scan_s: float,
    ) -> None:
        self._root = root
        self._capacity_nbytes = capacity_nbytes
        self._disk = FreeSpace(root, keep_free_percent)
        self._said_too_little = False  # that there is less room than the capacity
        self._num_threads = threads
        self._scan_s = scan_s
        self._folder = ValueFolder(root, direct, sync)
        self._read_threads = BlockingCalls(threads, "file-get")
        self._write_threads = BlockingCalls(threads, "file-put")
        self._stat_threads = BlockingCalls(threads, "file-stat")
        self._prepare_lock = threading.Lock()
        self._capacity: DirectoryCapacity | None = None  # None until the directory has been reached
        self._scan_error: OSError | ConfigError | None = None  # of the last scan; None: it worked
        self._closed, self._scan_now = threading.Event(), threading.Event()
        self._scan_thread = threading.Thread(target=self._scan_now_and_then, name="kvkern-file-scan", daemon=True)

    async def open(self) -> None:
        try:
            await self._stat_threads.run(self._prepare)
        except ConfigError:
            await self.close()
            raise
        except OSError as error:
            self._scan_error = error
            raise RemoteError(f"file://{self._root}: {error}") from error
        finally:
            if not self._closed.is_set():
                self._scan_thread.start()

    async def close(self) -> None:
        self._closed.set()
        self._scan_now.set()
        if self._capacity is not None:
            self._capacity.closing = True
        for threads in (self._read_threads, self._write_threads, self._stat_threads):
            threads.close()
        if self._scan_thread.is_alive():
            self._scan_thread.join(_RETRY_S)  # a daemon thread: a file system that hangs keeps no process alive

    async def register(self, memory: memoryview) -> None:
        pass

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool | None]:
        there: list[bool | None] = [None] * len(keys)

        def look(row: int) -> None:
            found = self._folder.size(file_name(keys[row])) is not None
            if not found and False not in there:
                self._folder.check_root()  # an empty mount point holds no values: that is no miss
            there[row] = found

        errors = await self._for_each_row(
            self._stat_threads, len(keys), look, timeout_s, -(-len(keys) // _STATS_A_THREAD)
        )
        return checked_answers(there, errors)

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        got: list[Got | None] = [None] * len(keys)
        end = len(keys)  # row of the first miss

        def read(row: int) -> None:
            nonlocal end
            if row < end:
                outcome = self._folder.read(file_name(keys[row]), into[row])
                if outcome is Got.MISS:
                    self._folder.check_root()
                    end = min(end, row)
                got[row] = outcome

        return checked_get_answers(got, await self._for_each_row(self._read_threads, len(keys), read, timeout_s))

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool | None]:
        taken: list[bool | None] = [None] * len(keys)

        def write(row: int) -> None:
            taken[row] = self._write(file_name(keys[row]), values[row])

        errors = await self._for_each_row(self._write_threads, len(keys), write, timeout_s)
        if self._capacity is not None and self._capacity.wants_scan:
            self._scan_now.set()
        return checked_answers(taken, errors)

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        for error in await self._for_each_row(
            self._write_threads, len(keys), lambda row: self._remove(file_name(keys[row])), timeout_s
        ):
            raise error

    async def _for_each_row(
        self,
        threads: BlockingCalls,
        count: int,
        call: Callable[[int], None],  # raises OSError
        timeout_s: float,
        max_threads: int = 1 << 30,
    ) -> list[RemoteError]:
        """Run `call` for each row, in order, several at a time, until one fails. Returns when none is under way any more."""
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
                        raise TimeoutError(f"only {row} of {count} values were done in {timeout_s:.1f} s")
                    call(row)
                except OSError as error:
                    rows.clear()
                    raise RemoteError(f"file://{self._root}: {error}") from error

        workers = (threads.run(work) for _ in range(min(self._num_threads, count, max_threads)))
        errors = []
        for outcome in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(outcome, RemoteError):
                errors.append(outcome)
            elif outcome is not None:
                raise outcome
        return errors

    def _write(self, name: str, value: Parts) -> bool:
        space, nbytes = self._capacity, len(value[0]) + len(value[1])
        if space is None:
            raise OSError(
                errno.ENODEV,
                f"not reached yet ({self._scan_error}); mount its file system or make the directory",
                self._root,
            )
        if self._folder.touch(name, nbytes):
            return True
        there_nbytes = self._folder.nbytes_used(name)
        if not space.reserve(nbytes):
            if self._scan_error is not None:
                raise OSError(errno.EIO, f"cannot be scanned for values to evict ({self._scan_error})", self._root)
            return False
        written = False
        try:
            written = self._folder.create(name, value) or (space.evict(nbytes) and self._folder.create(name, value))
        except InTheWayError:
            return False
        finally:
            if written:
                space.wrote(name, nbytes, there_nbytes)
            else:
                space.release(nbytes)
        if written:
            self._folder.settle(name)
        return written

    def _remove(self, name: str) -> None:
        nbytes = self._folder.remove(name)
        if nbytes is not None and self._capacity is not None:
            self._capacity.removed(name, nbytes)

    def _prepare(self) -> None:
        """Check the directory and its file system, once. Raises ConfigError, or OSError for a fault that may pass."""
        with self._prepare_lock:
            if self._capacity is not None:
                return
            disk_nbytes = self._folder.prepare()
            if not disk_nbytes and not self._capacity_nbytes:
                raise ConfigError(
                    f"The file system of file://{self._root} does not say how large it is. Add ?capacity="
                )
            if 0 < disk_nbytes < self._capacity_nbytes:
                raise ConfigError(
                    f"capacity of file://{self._root} is {format_nbytes(self._capacity_nbytes)}, but its file system has "
                    f"{format_nbytes(disk_nbytes)}. Lower the capacity"
                )
            capacity_nbytes = self._capacity_nbytes or disk_nbytes // 2
            self._capacity = DirectoryCapacity(self._root, capacity_nbytes, disk=self._disk, clock=self._folder.clock)

    def _say_what_fits(self, space: DirectoryCapacity) -> None:
        """Warn if the disk has less room than the capacity. Once, until it has enough again."""
        room = space.room_nbytes()
        if room < space.capacity_nbytes and not self._said_too_little:
            logger.warning(
                "kvkern: file://%(folder)s has a capacity of %(capacity)s%(of_what)s, but its disk has room for "
                "%(room)s: others use the rest, and %(kept)s stay free for them. kvkern keeps to that room. Make "
                "room, lower the capacity, or give another directory",
                {
                    "event": "store_disk_small",
                    "folder": self._root,
                    "capacity": format_nbytes(space.capacity_nbytes),
                    "of_what": "" if self._capacity_nbytes else " (half of the file system)",
                    "room": format_nbytes(room),
                    "kept": format_nbytes(self._disk.kept_nbytes()),
                },
            )  # fmt: skip
        self._said_too_little = room < space.capacity_nbytes

    def _scan_now_and_then(self) -> None:
        """Scan from time to time, on a thread of its own, until the store is closed."""
        while True:
            start = time.monotonic()
            gap_s = self._scan_s
            try:
                self._prepare()
                if self._capacity is not None:
                    self._capacity.scan()
                    self._capacity.trim()
                    self._capacity.leave_free()
                    self._say_what_fits(self._capacity)
                self._scan_error = None
            except (OSError, ConfigError) as error:  # it may pass; `put` reports it if it needs the scan
                self._scan_error = error
                gap_s = _RETRY_S
            took_s = time.monotonic() - start
            if self._closed.wait(took_s):
                return
            self._watch_disk(max(gap_s, 20 * took_s))
            self._scan_now.clear()
            if self._closed.is_set():
                return

    def _watch_disk(self, seconds: float) -> None:
        """Wait until the next scan is due, and make room meanwhile if others fill the disk."""
        end = time.monotonic() + seconds
        while (left_s := end - time.monotonic()) > 0 and not self._scan_now.wait(min(left_s, WATCH_S)):
            if self._capacity is not None:
                with suppress(OSError):  # it may pass; the scan reports it
                    if not self._capacity.leave_free() and self._capacity.used_nbytes and self._capacity.wants_scan:
                        return
