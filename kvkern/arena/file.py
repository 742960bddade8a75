"""The arena: one file of slots in shared memory. The first process creates it, and all processes map it.

    file = header page | slot 0 | slot 1 | ...        slots as in arena/slots.py
    header page = sizes and identity, as in _FILE_HEADER; from byte 1024 on a byte for each seat that is taken; from byte 2048
                  on the processes that a daemon gave the file to

The first process creates and prefaults the file under a record lock. The other processes wait for the lock and check that
they expect the same geometry. Every process holds a shared flock while it maps the file. So a file without a flock is
stale, and the next start removes it. Processes that take seats are all different: two engines of one name cannot make up
the number of one arena. With `expected` set (embedded mode) the last process to attach unlinks the name: the
memory then dies with its mappings, even on kill -9. This module knows bytes, not tensors or keys.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..config import format_nbytes
from ..errors import ArenaError, ConfigError
from .free_memory import free_memory
from .mapping import map_shared, populate
from .slots import HEAD, IDENTITY, PAGE, SlotGeometry, SlotState, round_up

Progress = Callable[[str], None]

_FILE_MAGIC = b"KVKARENA"
# magic, version, attached, slots, part bytes, planes, world size, identity
_FILE_HEADER = struct.Struct("<8sIIQQQQ32s")
_FILE_VERSION = 2
_SEATS_AT, _MAX_SEATS = 1024, 1024
_PROCESSES_AT, MAX_PROCESSES = 2048, 128
_PROCESS = np.dtype([("pid", "<u8"), ("start", "<u8")])
_PIECE = 256 << 20
_LOCK_WAIT_S = 600.0


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

    def close(self) -> None:
        """Close the descriptor. The mapping and its lock go with the last view. The file stays unless it was unlinked."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def create_or_attach(
    spec: ArenaSpec,
    path: Path,
    expected: int = 0,  # number of processes that will attach; the last one unlinks the name. 0: no process unlinks it
    prefault: bool = True,
    progress: Progress = lambda line: None,
    seat: int | None = None,  # this process's place among the expected ones, in [0, expected); None: they take no seats
) -> Arena:
    """Map the arena at `path`, and create it if it does not exist. With `prefault`, returns when every page is allocated.

    Raises ArenaError if the file system or the memory has no room, if this process may not use the file, if the file is
    another arena, if the seat is taken, or if the creator does not finish.
    """
    while True:
        with _faults_of(path, "made", spec.nbytes):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                _check_owner(fd, path)
                fcntl.flock(fd, fcntl.LOCK_SH)
                with _record_lock(fd, path):
                    if _still_named(
                        fd, path
                    ):  # else the file was removed, or its creator failed, while this process waited
                        return Arena(spec, path, fd, _create_or_map(fd, spec, path, expected, prefault, progress, seat))
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


def _create_or_map(
    fd: int, spec: ArenaSpec, path: Path, expected: int, prefault: bool, progress: Progress, seat: int | None
) -> npt.NDArray[np.uint8]:
    """Create or attach, then unlink the name if this is the last expected process. Call under the record lock."""
    created = os.fstat(fd).st_size == 0
    memory = _create(fd, spec, path, prefault, progress) if created else _attach(fd, spec, path, prefault)
    if seat is not None:
        _take_seat(memory, seat, path)
    attached = int(struct.unpack_from("<I", memory.data, 12)[0]) + 1
    struct.pack_into("<I", memory.data, 12, attached)
    if expected and attached >= expected:
        path.unlink(missing_ok=True)
    return memory


def _take_seat(memory: npt.NDArray[np.uint8], seat: int, path: Path) -> None:
    if not 0 <= seat < _MAX_SEATS:
        raise ArenaError(f"seat {seat} is outside [0, {_MAX_SEATS}), the seats of arena {path}; run fewer processes")
    if memory[_SEATS_AT + seat]:
        raise ArenaError(
            f"arena {path} has a process in seat {seat} already: another engine of the same name is starting, and both would "
            f"share slots without knowing. Give each engine an `engine_id` of its own, or give none"
        )
    memory[_SEATS_AT + seat] = 1


def attach_descriptor(fd: int, spec: ArenaSpec, path: Path, prefault: bool = True) -> Arena:
    """Map an arena whose descriptor another process passed. The arena owns `fd` from now on. Raises ArenaError."""
    try:
        with _faults_of(path, "opened", spec.nbytes):
            return Arena(spec, path, fd, _attach(fd, spec, path, prefault))
    except BaseException:
        os.close(fd)
        raise


def read_spec(path: Path) -> ArenaSpec | None:
    """Return the spec of the arena file at `path`, so that a daemon can take it over. None if it is no finished arena.

    Raises ArenaError if the arena has another version, belongs to another user, or cannot be opened.
    """
    with _faults_of(path, "opened"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return _spec_of(fd, path)
        finally:
            os.close(fd)


def _spec_of(fd: int, path: Path) -> ArenaSpec | None:
    """Return the spec of an opened arena, or None if it is no finished arena. Raises ArenaError and OSError."""
    _check_owner(fd, path)
    raw = os.pread(fd, _FILE_HEADER.size, 0)
    if len(raw) < _FILE_HEADER.size or raw[:8] != _FILE_MAGIC:
        return None
    _, version, _, slots, part, planes, world, identity = _FILE_HEADER.unpack(raw)
    if version != _FILE_VERSION:
        raise ArenaError(
            f"arena {path} has version {version}, this kvkern reads {_FILE_VERSION}; remove the file when no engine "
            f"uses it any more: it is only a cache"
        )
    spec = ArenaSpec(SlotGeometry(part, planes, world), slots, identity)
    return spec if os.fstat(fd).st_size == spec.nbytes else None


def is_unfinished_arena(path: Path) -> bool:
    """Return True if `path` holds an unfinished arena: the file exists, but its header was never written.

    The creator writes the header last. Raises ArenaError if the file cannot be read.
    """
    with _faults_of(path, "opened"):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return not any(file.read(8))


@contextmanager
def _faults_of(
    path: Path,
    verb: str,  # what fails: "made", "opened"
    nbytes: int | None = None,  # of the arena; None: not known yet
) -> Iterator[None]:
    """Turn an OSError of the arena's file or folder into an ArenaError with the path, the size and the remedy."""
    try:
        yield
    except OSError as error:
        size = "" if nbytes is None else f" (it takes {format_nbytes(nbytes)})"
        remedy = _REMEDIES.get(error.errno or 0, "look at the folder, or use another arena_dir")
        raise ArenaError(
            f"arena {path} cannot be {verb}: {error.strerror}{size}; {remedy.format(uid=os.getuid())}"
        ) from error


_ANOTHER_FOLDER = "use an arena_dir in which uid {uid} can make files, such as a tmpfs of its own"
_NO_FOLDER = "make the folder, or use another arena_dir"
_REMEDIES = {
    errno.EACCES: _ANOTHER_FOLDER,
    errno.EPERM: _ANOTHER_FOLDER,
    errno.EROFS: _ANOTHER_FOLDER,
    errno.ENOENT: _NO_FOLDER,
    errno.ENOTDIR: _NO_FOLDER,
    errno.ENOSPC: "make room in the folder's file system (bytes or files), or use another arena_dir",
    errno.EDQUOT: "raise the quota on the folder's file system, or use another arena_dir",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or lower `capacity`",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ELOOP: "a link has this name; remove it",
    errno.EISDIR: "a folder has this name; remove it",
    errno.ENOMEM: "lower `capacity`, or give this process more memory",
    errno.ENOLCK: "use an arena_dir whose file system has locks, such as a tmpfs",
}


def _check_owner(fd: int, path: Path) -> None:
    owner = os.fstat(fd).st_uid
    if owner != os.getuid():
        raise ArenaError(
            f"arena {path} belongs to uid {owner}, but this process is uid {os.getuid()}, and the owner could read all of "
            f"it; remove the file, or use another arena_dir"
        )


def _still_named(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _record_lock(fd: int, path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file. It excludes other open files, also of this process.

    It is independent of the flock that shows that the file is in use.
    """
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, PAGE, 0)
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
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
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, 0, PAGE, 0))


def _create(fd: int, spec: ArenaSpec, path: Path, prefault: bool, progress: Progress) -> npt.NDArray[np.uint8]:
    try:
        _check_room(spec.nbytes, path)
        os.ftruncate(fd, spec.nbytes)
        memory = _map_file(fd, spec.nbytes, path)
        if prefault:
            _allocate(fd, memory, path, progress)
    except BaseException:
        path.unlink(missing_ok=True)
        os.ftruncate(fd, 0)
        raise
    geometry = spec.geometry
    _FILE_HEADER.pack_into(
        memory.data, 0,
        _FILE_MAGIC, _FILE_VERSION, 0, spec.num_slots, geometry.part_nbytes, geometry.max_planes, geometry.world_size,
        spec.identity,
    )  # fmt: skip
    return memory


def _attach(fd: int, spec: ArenaSpec, path: Path, prefault: bool) -> npt.NDArray[np.uint8]:
    raw = os.pread(fd, _FILE_HEADER.size, 0)
    if len(raw) < _FILE_HEADER.size or raw[:8] != _FILE_MAGIC:
        raise ArenaError(f"{path} exists, but is no finished kvkern arena; if no engine uses it, remove it")
    _, version, _, slots, part, planes, world, identity = _FILE_HEADER.unpack(raw)
    if version != _FILE_VERSION:
        raise ArenaError(
            f"arena {path} has version {version}, this kvkern reads {_FILE_VERSION}; use the same kvkern in all processes"
        )
    found = ArenaSpec(SlotGeometry(part, planes, world), slots, identity)
    if found != spec or os.fstat(fd).st_size != spec.nbytes:
        differ = "identity" if replace(found, identity=spec.identity) == spec else "geometry"
        raise ArenaError(
            f"arena {path} has another {differ}: found {found}, expected {spec}; use the same options in all processes"
        )
    memory = _map_file(fd, spec.nbytes, path)
    if prefault:
        populate(memory)
    return memory


def _map_file(fd: int, nbytes: int, path: Path) -> npt.NDArray[np.uint8]:
    try:
        return map_shared(fd, nbytes)
    except OSError as error:
        raise ArenaError(
            f"arena {path} of {format_nbytes(nbytes)} cannot be mapped: {error.strerror}; "
            f"lower `capacity`, or raise the limit on address space (ulimit -v)"
        ) from error


def _allocate(fd: int, memory: npt.NDArray[np.uint8], path: Path, progress: Progress) -> None:
    """Reserve and touch all pages. So a full file system is an error now and not a SIGBUS later."""
    start, nbytes = time.monotonic(), len(memory)
    for offset in range(0, nbytes, _PIECE):
        try:
            os.posix_fallocate(fd, offset, min(_PIECE, nbytes - offset))
        except OSError as error:
            raise ArenaError(_no_room(nbytes, path, f"the kernel says: {error.strerror}")) from error
        done = min(offset + _PIECE, nbytes)
        populate(memory[offset:done])
        if done % (16 * _PIECE) == 0 or done == nbytes:
            seconds = time.monotonic() - start
            progress(f"arena: {format_nbytes(done)} of {format_nbytes(nbytes)} ready after {seconds:.1f} s")


def _check_room(nbytes: int, path: Path) -> None:
    fs = os.statvfs(path.parent)
    room = fs.f_bavail * fs.f_frsize
    if nbytes > room:
        raise ArenaError(_no_room(nbytes, path, f"only {format_nbytes(room)} are free there"))
    memory = free_memory()
    if nbytes > memory.nbytes:
        raise ArenaError(
            f"the arena needs {format_nbytes(nbytes)} of memory, but only {format_nbytes(memory.nbytes)} are free "
            f"{memory.source}. Lower `capacity`, or raise the limit (docker run --memory, resources.limits.memory in "
            f"Kubernetes, MemoryMax= in systemd)"
        )


def _no_room(nbytes: int, path: Path, why: str) -> str:
    return (
        f"the arena needs {format_nbytes(nbytes)} in {path.parent}, but {why}. Lower `capacity`, or enlarge the mount "
        f"(mount -o remount,size=..., docker run --shm-size=..., an emptyDir with medium: Memory in Kubernetes)"
    )


def sweep_stale(directory: Path, prefix: str) -> list[Path]:
    """Unlink this user's arenas that no process maps any more. Returns the removed paths. Leaves what it may not remove."""
    removed = []
    for path in directory.glob(f"{prefix}*"):
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _still_named(fd, path):
                path.unlink(missing_ok=True)
                removed.append(path)
        except OSError:
            continue  # a process maps it, or the file system has no locks or is read-only
        finally:
            os.close(fd)
    return removed


def arena_prefix(uid: int) -> str:
    """Return the first part of the names of a user's arenas. There is one arena per uid and trust domain."""
    return f"kvkern-{uid}-"
