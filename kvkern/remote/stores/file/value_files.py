"""Values as files: written whole or not at all, read into the caller's memory. Knows no capacity and no threads.

    create  open .kvkern-<random>.tmp in the value's directory, write, rename
    read    open, fstat (the size must be right), preadv

Raises the OSErrors of the system. `prepare` turns the errors that a user can correct into ConfigError.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from secrets import token_hex

import numpy as np

from ....errors import ConfigError
from ..base import Got, Parts, value_name
from .capacity import REFRESH_S
from .clock import FileSystemClock

_ALIGN = 4096  # of memory, sizes and offsets with O_DIRECT
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}
_MISCONFIGURED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip

_Move = Callable[[int, list[memoryview], int], int]  # os.preadv, os.pwritev


def file_name(key: bytes) -> str:
    """Return the path of a value below the root."""
    folder, _, name = value_name(key).rpartition("/")
    return f"{folder}/{name[:2]}/{name}"


class ValueFolder:
    """The files of a store. Call `prepare` first; then use it from any thread."""

    def __init__(
        self,
        root: str,
        want_direct: str,  # auto, yes, no
        sync: bool,
    ) -> None:
        self._root = root
        self.clock = FileSystemClock(f"{root}/{os.path.dirname(value_name(bytes(32)))}")
        self._want_direct = want_direct
        self._sync = sync
        self._direct = False
        self._parent_device = 0
        self._is_mount = False
        self._group_rights = 0  # rights that the directory gives its group

    def prepare(self) -> int:
        """Make the directory if its parent exists, and check what it can do. Returns the bytes of the file system.

        A file system that does not know its size has 0 bytes.
        """
        try:
            return self._prepare()
        except OSError as error:
            if error.errno not in _MISCONFIGURED:
                raise
            raise ConfigError(
                f"file://{self._root} cannot be used: {error}. Give a directory that this user may write to, or one that can "
                f"be made in an existing directory"
            ) from error

    def size(self, name: str) -> int | None:
        """Return the bytes of a value, or None if there is none."""
        try:
            return os.stat(f"{self._root}/{name}").st_size
        except FileNotFoundError:
            return None

    def touch(self, name: str) -> bool:
        """Note that a value is used. Returns False if there is none."""
        with suppress(FileNotFoundError):
            _touch(f"{self._root}/{name}")
            return True
        return False

    def read(self, name: str, into: Parts) -> Got:
        """Read a value, if there is one and it has the size of `into`."""
        try:
            return self._read(f"{self._root}/{name}", into)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return self._read(f"{self._root}/{name}", into)  # another node replaced it between open and read

    def create(self, name: str, value: Parts) -> bool:
        """Write a value. Returns False if the disk or a quota is full. A failed write leaves no file behind."""
        folder = f"{self._root}/{name.rpartition('/')[0]}"
        temporary = _temporary(folder)
        try:
            fd = self._create_file(temporary, self._direct_flag(value))
            try:
                try:
                    if _move_all(os.pwritev, fd, value) != len(value[0]) + len(value[1]):
                        raise OSError(errno.EIO, "written in part", temporary)
                    if self._sync:
                        os.fdatasync(fd)
                finally:
                    os.close(fd)  # raises errors that a network file system noticed late
                os.rename(temporary, f"{self._root}/{name}")
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            if self._sync:
                _sync_directory(folder)
        except OSError as error:
            if error.errno in _FULL:
                return False
            raise
        return True

    def remove(self, name: str) -> int | None:
        """Remove a value. Returns its bytes, or None if there was none."""
        with suppress(FileNotFoundError):
            nbytes = os.lstat(f"{self._root}/{name}").st_size
            os.unlink(f"{self._root}/{name}")
            return nbytes
        return None

    # -- files ---------------------------------------------------------------------------------------------------------

    def _read(self, path: str, into: Parts) -> Got:
        nbytes = len(into[0]) + len(into[1])
        direct = self._direct_flag(into)
        try:
            fd = os.open(path, os.O_RDONLY | direct)
        except FileNotFoundError:
            return Got.MISS
        try:
            found = os.fstat(fd)
            # Through the page cache, reading the header alone makes the kernel read ahead while it copies.
            if found.st_size != nbytes or _move_all(os.preadv, fd, into, together=bool(direct)) != nbytes:
                return Got.WRONG_SIZE
            now_ns = self.clock.now_ns()
            if now_ns is not None and abs(now_ns - found.st_mtime_ns) > REFRESH_S * 1e9:
                _touch(fd)
            return Got.HIT
        finally:
            os.close(fd)

    def _direct_flag(self, parts: Parts) -> int:
        return os.O_DIRECT if self._direct and all(map(_is_aligned, parts)) else 0

    def _create_file(self, path: str, flags: int) -> int:
        """Create a file that must not exist, and the directories it is in. Returns its descriptor."""
        flags |= os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            self.check_root()
            folder = path.rpartition("/")[0]
            for directory in (self._root, folder.rpartition("/")[0], folder):
                with suppress(FileExistsError):
                    os.mkdir(directory, 0o700)
                    if self._group_rights:
                        os.chmod(directory, stat.S_IMODE(os.stat(directory).st_mode) | self._group_rights)
            fd = os.open(path, flags, 0o600)
        if self._group_rights & 0o060:
            os.fchmod(fd, 0o600 | self._group_rights & 0o060)
        return fd

    # -- the directory -------------------------------------------------------------------------------------------------

    def _prepare(self) -> int:
        self._parent_device = os.stat(os.path.dirname(self._root)).st_dev
        with suppress(FileExistsError):
            os.mkdir(self._root, 0o700)
        self._group_rights = os.stat(self._root).st_mode & 0o070
        self._is_mount = os.path.ismount(self._root)
        has_room = self._probe(0)
        self._direct = self._want_direct != "no" and self._probe(os.O_DIRECT)
        if self._want_direct == "yes" and has_room and not self._direct:
            raise ConfigError(
                f"direct of file://{self._root} is yes, but its file system has no O_DIRECT. Use direct=auto"
            )
        self.clock.measure()
        disk = os.statvfs(self._root)
        return disk.f_frsize * disk.f_blocks

    def _probe(self, flags: int) -> bool:
        """Return True if a file can be written and read with these flags. A full disk gives False."""
        path = _temporary(f"{self._root}/{os.path.dirname(file_name(bytes(32)))}")
        with mmap.mmap(-1, _ALIGN) as page, memoryview(page) as memory:
            try:
                fd = self._create_file(path, flags)
                try:
                    return _move_all(os.pwritev, fd, (memory,)) == _move_all(os.preadv, fd, (memory,)) == _ALIGN
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno in _FULL or (flags and error.errno in _NO_DIRECT):
                    return False
                raise
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(path)

    def check_root(self) -> None:
        """Raise OSError if the file system is not mounted any more: values would fill the disk below the mount point."""
        try:
            os.stat(self._root)
            gone = self._is_mount and not os.path.ismount(self._root)
        except FileNotFoundError:
            gone = self._is_mount or os.stat(os.path.dirname(self._root)).st_dev != self._parent_device
        if gone:
            raise OSError(errno.ENODEV, "its file system is not mounted any more; mount it again", self._root)


def _temporary(folder: str) -> str:
    return f"{folder}/.kvkern-{token_hex(8)}.tmp"


def _is_aligned(memory: memoryview) -> bool:
    if len(memory) % _ALIGN:
        return False
    return not len(memory) or np.frombuffer(memory, dtype=np.uint8).ctypes.data % _ALIGN == 0


def _touch(file: int | str) -> None:
    with suppress(PermissionError):  # the file of another user: its last use stays as it is
        os.utime(file)  # a network file system uses the clock of its server


def _move_all(move: _Move, fd: int, parts: Sequence[memoryview], together: bool = True) -> int:
    """Move all parts, from the start of the file. Returns the bytes moved: fewer if the file ends before."""
    left = [part for part in parts if len(part)]
    at = 0
    while left:
        moved = move(fd, left if together else left[:1], at)
        if not moved:
            break
        at += moved
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if left and moved:  # stopped inside a part: the rest may be unaligned
            left[0] = left[0][moved:]
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return at


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
