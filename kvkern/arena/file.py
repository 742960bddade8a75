"""The arena: one file of slots in shared memory. The first process creates it, and all processes map it.

    file = header page | slot 0 | slot 1 | ...        slots as in arena/slots.py
    header page = sizes and identity, as in _FILE_HEADER; from byte 96 on the id of the boot that its process ids belong to;
                  from byte 1024 on a byte for each seat that is taken; from byte 2048 on the processes that a daemon gave
                  the file to

The first process creates the file and reserves its pages under a record lock. The other processes wait for the lock and
check that they expect the same geometry. Every process holds a shared flock while it maps the file. So a file without a
flock is stale, and the next start removes it. Processes that take seats are all different: two engines of one name cannot
make up the number of one arena. With `expected` set (embedded mode) the last process to attach unlinks the name: the
memory then dies with its mappings, even on kill -9. No core dump holds the mappings unless that is asked for. This module
knows bytes, not tensors or keys.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..config import MAX_CAPACITY_NBYTES, format_nbytes
from ..errors import ArenaError, ConfigError
from ..regular_files import open_regular
from .folder import is_private_folder, make_private_folder, remove_if_empty, still_named
from .mapping import map_shared, populate
from .process_identity import boot_id
from .room import Progress, allocate, check_owner, check_room, faults_of, missing_nbytes, reserve
from .slots import HEAD, IDENTITY, PAGE, SlotGeometry, SlotState, round_up

logger = logging.getLogger("kvkern")

_FILE_MAGIC = b"KVKARENA"
# magic, version, attached, slots, part bytes, planes, world size, identity
_FILE_HEADER = struct.Struct("<8sIIQQQQ32s")
_FILE_VERSION = 2
_BOOT_AT, _BOOT_NBYTES = 96, 16
_SEATS_AT, _MAX_SEATS = 1024, 1024
_PROCESSES_AT, MAX_PROCESSES = 2048, 128
_PROCESS = np.dtype([("pid", "<u8"), ("start", "<u8")])
_LOCK_WAIT_S = 600.0
LOCKED_S = 1.0  # how long a daemon waits for the locks of its own arena


@dataclass(frozen=True, slots=True)
class ArenaSpec:
    """What an arena file must look like for a process to attach to it."""

    geometry: SlotGeometry
    num_slots: int
    identity: bytes = bytes(
        32
    )  # chosen by the user of the arena, for example a layout fingerprint; must match to attach

    @classmethod
    def for_capacity(cls, geometry: SlotGeometry, capacity_nbytes: int, identity: bytes = bytes(32)) -> ArenaSpec:
        """Return the spec of an arena with as many slots as fit. Raises ConfigError if none fits."""
        slots = (capacity_nbytes - PAGE) // geometry.slot_nbytes
        if slots < 1:
            raise ConfigError(
                f"capacity {format_nbytes(capacity_nbytes)} holds no slot: one chunk of this model needs "
                f"{format_nbytes(geometry.slot_nbytes + PAGE)} (all layers, {geometry.world_size} rank(s)); "
                f"raise the capacity or use fewer blocks per chunk"
            )
        return cls(geometry, slots, identity)

    @property
    def nbytes(self) -> int:
        """Exact size of the file."""
        return round_up(PAGE + self.num_slots * self.geometry.slot_nbytes, PAGE)


class Slots(Protocol):
    """What tiers and copiers use of an arena: a header and a part of payload for each slot. `Arena` or tiers.hbm.HbmSlots."""

    spec: ArenaSpec
    headers: npt.NDArray[np.void]  # [num_slots] of SlotGeometry.dtype
    identities: npt.NDArray[np.void]  # [num_slots] V104: the first bytes of the headers
    heads: npt.NDArray[np.void]  # [num_slots] V152 of slots.HEAD

    def parts(
        self,
        rank: int,
    ) -> npt.NDArray[np.uint8]:  # [num_slots, part_stride] uint8 view
        """See `Arena.parts`."""

    def mark_bad(self, slots: npt.NDArray[np.int64]) -> None:
        """See `Arena.mark_bad`."""


class Arena:
    """A mapped arena. Made by `create_or_attach`. Call `close` when no view of it is used any more."""

    def __init__(self, spec: ArenaSpec, path: Path, fd: int, memory: npt.NDArray[np.uint8]) -> None:
        self.spec = spec
        self.path = path
        self._fd = fd
        # Some file systems count fewer blocks than they have reserved, because they compress.
        self._uncounted_nbytes = missing_nbytes(fd, spec.nbytes)
        # [num_slots] structured view of every slot's header; all processes share it
        self.headers = self._starts(spec.geometry.dtype, memory)
        # [num_slots] views of the first bytes of the headers: V104, see SlotGeometry.identities, and V152 of slots.HEAD
        self.identities = self._starts(IDENTITY, memory)
        self.heads = self._starts(np.dtype(f"V{HEAD.itemsize}"), memory)
        self.bytes: npt.NDArray[np.uint8] = memory  # the whole file
        # [MAX_PROCESSES] (pid, start) of processes that may read or write slots; zeros if unused. Only a daemon writes it.
        self.processes: npt.NDArray[np.void] = np.ndarray((MAX_PROCESSES,), _PROCESS, memory.data, offset=_PROCESSES_AT)

    def _starts(self, dtype: np.dtype[np.void], memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
        shape, strides = (self.spec.num_slots,), (self.spec.geometry.slot_nbytes,)
        return np.ndarray(shape, dtype, memory.data, offset=PAGE, strides=strides)

    def parts(
        self,
        rank: int,
    ) -> npt.NDArray[np.uint8]:  # [num_slots, part_stride] uint8 view: every slot's part of one rank
        """Return the memory that a rank's worker copies into and out of. Row i is slot i. Rows are page-aligned."""
        geometry = self.spec.geometry
        if not 0 <= rank < geometry.world_size:
            raise ArenaError(
                f"rank {rank} is outside [0, {geometry.world_size}), the ranks of arena {self.path}; "
                f"use the same world size in all processes"
            )
        start = PAGE + geometry.header_nbytes + rank * geometry.part_stride
        shape, strides = (self.spec.num_slots, geometry.part_stride), (geometry.slot_nbytes, 1)
        return np.lib.stride_tricks.as_strided(self.bytes[start:], shape, strides)

    def mark_bad(self, slots: npt.NDArray[np.int64]) -> None:
        """Mark slots that did not verify: header or payload is not what was stored. A reader that holds a lease calls it."""
        self.headers["state"][slots] = SlotState.BAD

    def descriptor(self) -> int:
        """Open the file anew and return the descriptor, to pass to another process. It shares no lock with this process."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)

    def file_id(self) -> tuple[int, int]:
        """Return device and inode. Two mappings of the same memory have equal ids."""
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino

    def has_its_size(self) -> bool:
        """Return False if a process that has the file open has changed its size, or pages of it are not there any more.

        A page that is cut off is a SIGBUS.
        """
        whole = os.fstat(self._fd).st_size == self.spec.nbytes
        return whole and missing_nbytes(self._fd, self.spec.nbytes) <= self._uncounted_nbytes

    def renew_header(self) -> None:
        """Write what the file's header says of the arena again. Any process that maps the file may have changed it."""
        _write_header(self.bytes, self.spec)

    def restore(self) -> None:
        """Give the file its size and its pages back, and say so. Raises ArenaError if there is no room."""
        with faults_of(self.path, "repaired", self.spec.nbytes):
            _repair(self._fd, self.spec, self.path)

    def close(self) -> None:
        """Close the descriptor. The mapping and its lock go with the last view. The file stays unless it was unlinked."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def create_or_attach(
    spec: ArenaSpec,
    path: Path,
    expected: int = 0,  # number of processes that will attach; the last one unlinks the name. 0: no process unlinks it
    prefault: bool = True,  # touch every page now; without it all pages are reserved, and touched when they are used
    progress: Progress = lambda line: None,
    seat: int | None = None,  # this process's place among the expected ones, in [0, expected); None: they take no seats
    dump: bool = False,  # core dumps of this process hold the arena
    repair: bool = False,  # give a file that was cut, or that has holes, its size and its pages back; only for a daemon
) -> Arena:
    """Map the arena at `path`, and create it if it does not exist. Returns when every page is reserved.

    Raises ArenaError if the file system or the memory has no room, if this process may not use the file, if the file is
    another arena, if the seat is taken, or if the creator does not finish.
    """
    while True:
        with faults_of(path, "made", spec.nbytes):
            fd = _open_or_create(path)
            try:
                check_owner(fd, path)
                _close_to_others(fd, path)
                if repair and not _take_locks(fd):
                    # A daemon has the name for itself. So whoever holds a lock has the descriptor from an earlier one.
                    logger.warning(
                        "kvkern: %(path)s is locked by a process that an earlier daemon had let in. It is removed, "
                        "and a new one is made", {"event": "locked_arena_removed", "path": path},
                    )  # fmt: skip
                    path.unlink(missing_ok=True)
                    os.close(fd)
                    continue
                fcntl.flock(fd, fcntl.LOCK_SH)
                with _record_lock(fd, path):
                    if still_named(
                        fd, path
                    ):  # else the file was removed, or its creator failed, while this process waited
                        if os.fstat(fd).st_size == 0:
                            memory = _create(fd, spec, path, prefault, dump, progress)
                        else:
                            if repair and os.pread(fd, len(_FILE_MAGIC), 0) == _FILE_MAGIC:  # else it is no arena
                                _repair(fd, spec, path)
                            memory = _attach(fd, spec, path, prefault, dump)
                            _leave_earlier_boot(Arena(spec, path, fd, memory))
                        _count_process(memory, path, expected, seat)
                        return Arena(spec, path, fd, memory)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


def _open_or_create(path: Path) -> int:
    """Open the file, and create it and its folder if need be: another process may remove an empty folder at any time."""
    while True:
        try:
            return open_regular(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            if not is_private_folder(path.parent) or not make_private_folder(path.parent):
                raise


def _close_to_others(fd: int, path: Path) -> None:
    """Take from other users what the file's mode lets them do: they could read and forge all that engines store."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & 0o077:
        os.fchmod(fd, 0o600)
        logger.warning(
            "kvkern: %(path)s had the mode %(mode)04o, so other users could open it; it is 0600 now. Who had it open "
            "keeps it: to be sure, end all processes that use it and remove it",
            {"event": "arena_was_open", "path": path, "mode": mode},
        )  # fmt: skip


def _leave_earlier_boot(arena: Arena) -> None:
    """Forget the processes of an earlier boot: their ids and start times name other processes now, or nobody."""
    memory, boot = arena.bytes, boot_id()
    noted = memory[_BOOT_AT : _BOOT_AT + _BOOT_NBYTES].tobytes()
    if any(noted) and noted != boot:
        arena.processes[:] = (0, 0)
        arena.headers["owner_pid"][:] = 0
        arena.headers["owner_start"][:] = 0
        logger.info(
            "kvkern: %(path)s is of an earlier boot: no process that it names is waited for",
            {"event": "arena_of_earlier_boot", "path": arena.path},
        )
    memory[_BOOT_AT : _BOOT_AT + _BOOT_NBYTES] = np.frombuffer(boot, np.uint8)


def _count_process(memory: npt.NDArray[np.uint8], path: Path, expected: int, seat: int | None) -> None:
    """Take the seat, and unlink the name if this is the last expected process. Call under the record lock."""
    if seat is not None:
        _take_seat(memory, seat, path)
    attached = int(struct.unpack_from("<I", memory.data, 12)[0]) + 1
    struct.pack_into("<I", memory.data, 12, attached)
    if expected and attached >= expected:
        path.unlink(missing_ok=True)
        remove_if_empty(path.parent)


def _take_seat(memory: npt.NDArray[np.uint8], seat: int, path: Path) -> None:
    if not 0 <= seat < _MAX_SEATS:
        raise ArenaError(f"seat {seat} is outside [0, {_MAX_SEATS}), the seats of arena {path}; run fewer processes")
    if memory[_SEATS_AT + seat]:
        raise ArenaError(
            f"arena {path} has a process in seat {seat} already: another engine of the same name is starting, and both would "
            f"share slots without knowing. Give each engine an `engine_id` of its own, or give none"
        )
    memory[_SEATS_AT + seat] = 1


def attach_descriptor(fd: int, spec: ArenaSpec, path: Path, prefault: bool = True, dump: bool = False) -> Arena:
    """Map an arena whose descriptor another process passed. The arena owns `fd` from now on. Raises ArenaError.

    Whoever passed it has said what it is. The file's own header counts for nothing: every process that maps it can write it.
    """
    try:
        with faults_of(path, "opened", spec.nbytes):
            return Arena(spec, path, fd, _map_whole(fd, spec, path, prefault, dump))
    except BaseException:
        os.close(fd)
        raise


def read_spec(path: Path) -> ArenaSpec | None:
    """Return the spec of the arena file at `path`, so that a daemon can take it over. None if it is no finished arena.

    The file may be shorter than its spec says: see `create_or_attach`, `repair`. Raises ArenaError if the arena has another
    version, belongs to another user, or cannot be opened.
    """
    with faults_of(path, "opened"):
        try:
            fd = open_regular(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            check_owner(fd, path)
            raw = os.pread(fd, _FILE_HEADER.size, 0)
        finally:
            os.close(fd)
    if len(raw) < _FILE_HEADER.size or raw[:8] != _FILE_MAGIC:
        return None
    _, version, _, slots, part, planes, world, identity = _FILE_HEADER.unpack(raw)
    if version != _FILE_VERSION:
        raise ArenaError(
            f"arena {path} has version {version}, this kvkern reads {_FILE_VERSION}; remove the file when no engine "
            f"uses it any more: it is only a cache"
        )
    spec = ArenaSpec(SlotGeometry(part, planes, world), slots, identity)
    return spec if slots and part and world and spec.nbytes <= MAX_CAPACITY_NBYTES else None


def is_whole(path: Path, spec: ArenaSpec) -> bool:
    """Return True if the file has the size of its spec and no holes. Raises ArenaError if it cannot be examined."""
    with faults_of(path, "opened"):
        found = path.lstat()
        return found.st_size == spec.nbytes <= found.st_blocks * 512


def is_broken_arena(path: Path) -> bool:
    """Return True if `path` holds an arena that `read_spec` cannot use: unfinished, cut, or with senseless sizes.

    The creator writes the header last. Returns False for a file that no kvkern made. Raises ArenaError if it cannot be read.
    """
    with faults_of(path, "opened"):
        try:
            fd = open_regular(path)
        except FileNotFoundError:
            return False
        try:
            begin = os.pread(fd, len(_FILE_MAGIC), 0)
        finally:
            os.close(fd)
    return not any(begin) or _FILE_MAGIC.startswith(begin)


def _repair(fd: int, spec: ArenaSpec, path: Path) -> None:
    """Give the file the size of its spec, and a page for every byte. Says so if it had less. Raises ArenaError and OSError.

    The processes that have the file mapped keep it. The chunks that were in the lost pages do not verify.
    """
    found = os.fstat(fd).st_size
    lost = missing_nbytes(fd, spec.nbytes)
    if found == spec.nbytes and not lost:
        return
    os.ftruncate(fd, spec.nbytes)
    if found != spec.nbytes:
        logger.warning(
            "kvkern: %(path)s had %(found)s instead of %(size)s: a process that has it open has changed its size. It "
            "has its size again; the chunks that were cut off are gone",
            {"event": "arena_was_cut", "path": path, "found": format_nbytes(found), "size": format_nbytes(spec.nbytes)},
        )  # fmt: skip
    check_room(lost, path)
    reserve(fd, spec.nbytes, path)


def _take_locks(fd: int) -> bool:
    """Return False if one of the file's two locks is still held by others after LOCKED_S."""
    deadline = time.monotonic() + LOCKED_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _set_record_lock(fd, fcntl.F_WRLCK)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def _set_record_lock(fd: int, kind: int) -> None:
    """Take or end the lock of the header page. Raises BlockingIOError or PermissionError if another process has it."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, PAGE, 0))


@contextmanager
def _record_lock(fd: int, path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file. It excludes other open files, also of this process.

    It is independent of the flock that shows that the file is in use.
    """
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            _set_record_lock(fd, fcntl.F_WRLCK)
            break
        except (BlockingIOError, PermissionError) as error:  # another process holds it: EAGAIN or EACCES
            if time.monotonic() > deadline:
                raise ArenaError(
                    f"arena {path} is still being created by another process after {_LOCK_WAIT_S:.0f} s; "
                    f"check whether that process hangs, and end it"
                ) from error
            time.sleep(0.02)
    try:
        yield
    finally:
        _set_record_lock(fd, fcntl.F_UNLCK)


def _create(
    fd: int, spec: ArenaSpec, path: Path, prefault: bool, dump: bool, progress: Progress
) -> npt.NDArray[np.uint8]:
    try:
        check_room(spec.nbytes, path)
        os.ftruncate(fd, spec.nbytes)
        memory = _map_file(fd, spec.nbytes, path, dump)
        allocate(fd, memory, path, prefault, progress)
    except BaseException:
        path.unlink(missing_ok=True)
        remove_if_empty(path.parent)
        os.ftruncate(fd, 0)
        raise
    memory[_BOOT_AT : _BOOT_AT + _BOOT_NBYTES] = np.frombuffer(boot_id(), np.uint8)
    _write_header(memory, spec)
    return memory


def _write_header(memory: npt.NDArray[np.uint8], spec: ArenaSpec) -> None:
    geometry = spec.geometry
    _FILE_HEADER.pack_into(
        memory.data, 0,
        _FILE_MAGIC, _FILE_VERSION, 0, spec.num_slots, geometry.part_nbytes, geometry.max_planes, geometry.world_size,
        spec.identity,
    )  # fmt: skip


def _attach(fd: int, spec: ArenaSpec, path: Path, prefault: bool, dump: bool) -> npt.NDArray[np.uint8]:
    raw = os.pread(fd, _FILE_HEADER.size, 0)
    if len(raw) < _FILE_HEADER.size or raw[:8] != _FILE_MAGIC:
        raise ArenaError(f"{path} exists, but is no finished kvkern arena; if no engine uses it, remove it")
    _, version, _, slots, part, planes, world, identity = _FILE_HEADER.unpack(raw)
    if version != _FILE_VERSION:
        raise ArenaError(
            f"arena {path} has version {version}, this kvkern reads {_FILE_VERSION}; use the same kvkern in all processes"
        )
    found = ArenaSpec(SlotGeometry(part, planes, world), slots, identity)
    if found != spec:
        differ = "identity" if replace(found, identity=spec.identity) == spec else "geometry"
        raise ArenaError(
            f"arena {path} has another {differ}: found {found}, expected {spec}; use the same options in all processes"
        )
    return _map_whole(fd, spec, path, prefault, dump)


def _map_whole(fd: int, spec: ArenaSpec, path: Path, prefault: bool, dump: bool) -> npt.NDArray[np.uint8]:
    if (nbytes := os.fstat(fd).st_size) != spec.nbytes:
        raise ArenaError(
            f"arena {path} is not whole: it has {nbytes} bytes instead of {spec.nbytes}, because a process that has it open "
            f"has changed its size. Restart the daemon, which repairs it; without a daemon restart the engine"
        )
    memory = _map_file(fd, spec.nbytes, path, dump)
    if prefault:
        populate(memory)
    return memory


def _map_file(fd: int, nbytes: int, path: Path, dump: bool) -> npt.NDArray[np.uint8]:
    try:
        return map_shared(fd, nbytes, dump)
    except OSError as error:
        raise ArenaError(
            f"arena {path} of {format_nbytes(nbytes)} cannot be mapped: {error.strerror}; "
            f"lower `capacity`, or raise the limit on address space (ulimit -v)"
        ) from error
