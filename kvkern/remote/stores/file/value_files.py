"""One value at a time as a file: written whole or not at all, read into the caller's memory. Knows no capacity, no threads.

    create  open .kvkern-<random>.tmp in the value's directory, write, rename
    read    open, fstat: the size must be right; preadv

Raises OSError as the system gives it; `prepare` turns what a user can mend into ConfigError.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from secrets import token_hex

import numpy as np

from ....errors import ConfigError
from ..base import Got, Parts, value_name
from .capacity import REFRESH_S

_ALIGN = 4096  # of memory, sizes and offsets with O_DIRECT
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}
_MISCONFIGURED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip

_Move = Callable[[int, list[memoryview], int], int]  # os.preadv, os.pwritev


def file_name(key: bytes) -> str:
    """Below the root."""
    folder, _, name = value_name(key).rpartition("/")
    return f"{folder}/{name[:2]}/{name}"


class ValueFolder:
    """The files of a store. `prepare` first; then from any thread."""

    def __init__(
        self,
        root: str,
        want_direct: str,  # auto, yes, no
        sync: bool,
    ) -> None:
        self._root = root
        self._want_direct = want_direct
        self._sync = sync
        self._direct = False
        self._parent_device = 0
        self._is_mount = False
        self._share = 0  # rights of the group

    def prepare(self) -> int:
        """Bytes of the file system, after a look at what it can do. The directory is made if its parent is there."""
        try:
            return self._prepare()
        except OSError as error:
            if error.errno not in _MISCONFIGURED:
                raise
            raise ConfigError(
                f"file://{self._root} cannot be used: {error}; it must be a directory that this user may write to, or "
                f"one that can be made in an existing directory"
            ) from error

    def size(self, name: str) -> int | None:
        """Bytes of a value, None if there is none."""
        try:
            return os.stat(f"{self._root}/{name}").st_size
        except FileNotFoundError:
            return None

    def touch(self, name: str) -> bool:
        """A value is used; False if there is none."""
        with suppress(FileNotFoundError):
            _touch(f"{self._root}/{name}")
            return True
        return False

    def read(self, name: str, into: Parts) -> Got:
        """A value, if there is one and its size is that of the memory."""
        try:
            return self._read(f"{self._root}/{name}", into)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return self._read(f"{self._root}/{name}", into)  # another node replaced it between open and read

    def create(self, name: str, value: Parts) -> bool:
        """Write a value. False if the disk or a quota is full. No trace is left of what did not succeed."""
        folder = f"{self._root}/{name.rpartition('/')[0]}"
        temporary = _temporary(folder)
        try:
            fd = self._new(temporary, self._direct_flag(value))
            try:
                try:
                    if _move_all(os.pwritev, fd, value) != len(value[0]) + len(value[1]):
                        raise OSError(errno.EIO, "written in part", temporary)
                    if self._sync:
                        os.fdatasync(fd)
                finally:
                    os.close(fd)  # raises what a network file system found out late
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
        """Bytes a value had, None if there was none."""
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
            # Through the page cache, the header by itself makes the kernel read ahead while it copies.
            if found.st_size != nbytes or _move_all(os.preadv, fd, into, together=bool(direct)) != nbytes:
                return Got.WRONG_SIZE
            if abs(time.time() - found.st_mtime) > REFRESH_S:
                _touch(fd)
            return Got.HIT
        finally:
            os.close(fd)

    def _direct_flag(self, parts: Parts) -> int:
        return os.O_DIRECT if self._direct and all(map(_is_aligned, parts)) else 0

    def _new(self, path: str, flags: int) -> int:
        """A file that was not there, and the directories it is in."""
        flags |= os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            self.check_root()
            folder = path.rpartition("/")[0]
            for directory in (self._root, folder.rpartition("/")[0], folder):
                with suppress(FileExistsError):
                    os.mkdir(directory, 0o700)
                    if self._share:
                        os.chmod(directory, stat.S_IMODE(os.stat(directory).st_mode) | self._share)
            fd = os.open(path, flags, 0o600)
        if self._share & 0o060:
            os.fchmod(fd, 0o600 | self._share & 0o060)
        return fd

    # -- the directory -------------------------------------------------------------------------------------------------

    def _prepare(self) -> int:
        self._parent_device = os.stat(os.path.dirname(self._root)).st_dev
        with suppress(FileExistsError):
            os.mkdir(self._root, 0o700)
        self._share = os.stat(self._root).st_mode & 0o070
        self._is_mount = os.path.ismount(self._root)
        has_room = self._probe(0)
        self._direct = self._want_direct != "no" and self._probe(os.O_DIRECT)
        if self._want_direct == "yes" and has_room and not self._direct:
            raise ConfigError(f"direct of file://{self._root} is yes, but its file system knows no O_DIRECT; use auto")
        disk = os.statvfs(self._root)
        return disk.f_frsize * disk.f_blocks

    def _probe(self, flags: int) -> bool:
        """Whether a file can be written and read like this. A full disk says no."""
        path = _temporary(f"{self._root}/{os.path.dirname(file_name(bytes(32)))}")
        with mmap.mmap(-1, _ALIGN) as page, memoryview(page) as memory:
            try:
                fd = self._new(path, flags)
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
        """What was mounted has to be mounted still: else values would fill the disk below the mount point."""
        try:
            os.stat(self._root)
            gone = self._is_mount and not os.path.ismount(self._root)
        except FileNotFoundError:
            gone = self._is_mount or os.stat(os.path.dirname(self._root)).st_dev != self._parent_device
        if gone:
            raise OSError(errno.ENODEV, "its file system is not mounted any more", self._root)


def _temporary(folder: str) -> str:
    return f"{folder}/.kvkern-{token_hex(8)}.tmp"


def _is_aligned(memory: memoryview) -> bool:
    if len(memory) % _ALIGN:
        return False
    return not len(memory) or np.frombuffer(memory, dtype=np.uint8).ctypes.data % _ALIGN == 0


def _touch(file: int | str) -> None:
    with suppress(PermissionError):  # another user's: it ages
        os.utime(file)  # by the file server's clock, where there is one


def _move_all(move: _Move, fd: int, parts: Sequence[memoryview], together: bool = True) -> int:
    """Bytes moved, from the file's start: all, unless it ends before."""
    left = [part for part in parts if len(part)]
    at = 0
    while left:
        moved = move(fd, left if together else left[:1], at)
        if not moved:
            break
        at += moved
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if left and moved:  # in the middle of a part: the rest may be odd
            left[0] = left[0][moved:]
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return at


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
