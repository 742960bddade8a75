"""Values as files: written whole or not at all, read into the caller's memory. Knows no capacity and no threads.

    create  open .kvkern-<random>.tmp in the value's directory, write, rename
    read    open, fstat (a regular file of the right size, of an owner who may write here), preadv

What is in the place of a value and is none, such as a FIFO, a link or a file of a stranger, is a miss. It is told once per
kind, and the next write replaces it.

Raises the OSErrors of the system. `prepare` turns the errors that a user can correct into ConfigError.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from secrets import token_hex

import numpy as np

from ....errors import ConfigError
from ....regular_files import NotRegularError, open_with_status
from ..base import Got, Parts, value_name
from .capacity import REFRESH_S
from .clock import FileSystemClock
from .folders import LinkedFolderError, open_folder, open_inner_folder, who_else_may_write

logger = logging.getLogger("kvkern")

_ALIGN = 4096  # of memory, sizes and offsets with O_DIRECT
_FULL = {errno.ENOSPC, errno.EDQUOT}
_IN_THE_WAY = {errno.EISDIR, errno.EPERM}  # of a rename: a folder, or in a sticky folder the file of another user
_UNTOUCHED = {*_FULL, errno.EPERM, errno.EACCES, errno.EROFS}  # the value is there, and its last use stays as it is
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}
_MISCONFIGURED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip

_LINKED = "a folder on its path is a link or no folder"
_MAX_TOLD = 16  # kinds of things in the place of a value

_Move = Callable[[int, list[memoryview], int], int]  # os.preadv, os.pwritev


def file_name(key: bytes) -> str:
    """Return the path of a value below the root."""
    folder, _, name = value_name(key).rpartition("/")
    return f"{folder}/{name[:2]}/{name}"


class InTheWayError(OSError):
    """What has a value's name is none, and cannot be replaced. It was told; no other value is concerned."""


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
        self._group_id = -1  # the group that has them
        self._owners: set[int] = set()  # whose values are read, whatever their group
        self._told: set[str] = set()  # kinds of things in a value's place that the log has named

    def prepare(self) -> int:
        """Make the directory if its parent exists, and check what it can do. Returns the bytes of the file system.

        A file system that does not know its size has 0 bytes.
        """
        try:
            return self._prepare()
        except LinkedFolderError as error:
            raise ConfigError(
                f"file://{self._root} cannot be used: {error.filename} is a link or no folder, and kvkern counts nothing "
                f"behind a link. Remove it, or give the folder that it leads to"
            ) from error
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
            found = os.lstat(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) and self._is_trusted(found) else None

    def nbytes_used(self, name: str) -> int:
        """Return the bytes of the file that has this name, whoever wrote it. 0: there is none."""
        try:
            found = os.lstat(f"{self._root}/{name}")
        except FileNotFoundError:
            return 0
        return found.st_size if stat.S_ISREG(found.st_mode) else 0

    def touch(self, name: str, nbytes: int) -> bool:
        """Note that a value of this size is used. Returns False if there is none."""
        try:
            opened = self._open(name, 0)
        except (FileNotFoundError, PermissionError):
            return False
        if opened is None:
            return False
        fd, found = opened
        try:
            if found.st_size != nbytes:
                return False
            _touch(fd)
            return True
        finally:
            os.close(fd)

    def read(self, name: str, into: Parts) -> Got:
        """Read a value, if there is one and it has the size of `into`."""
        try:
            return self._read(name, into)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return self._read(name, into)  # another node replaced it between open and read

    def create(self, name: str, value: Parts) -> bool:
        """Write a value. Returns False if the disk or a quota is full. A failed write leaves no file behind.

        Call `settle` when the value is counted. Raises InTheWayError if what has this name cannot be replaced.
        """
        directory, _, file = name.rpartition("/")
        temporary = _temporary()
        try:
            folder = self._made_folder(directory)
            try:
                self._write(folder, temporary, value)
                os.rename(temporary, file, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as error:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                if error.errno not in _IN_THE_WAY:
                    raise
                self._say(
                    name, "it is a folder, or the file of another user in a sticky folder, and cannot be replaced"
                )
                return False
            finally:
                os.close(folder)
        except LinkedFolderError as error:
            self._say(name, _LINKED)
            raise InTheWayError(*error.args) from error
        except OSError as error:
            if error.errno in _FULL:
                return False
            raise
        return True

    def settle(self, name: str) -> None:
        """With `sync`, make the name of a value last through a power cut. A full disk is no error: the value is there."""
        if self._sync:
            try:
                fd = open_folder(self._root, name.rpartition("/")[0], os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno not in _FULL:
                    raise

    def remove(self, name: str) -> int | None:
        """Remove a value. Returns its bytes, or None if there was none."""
        directory, _, file = name.rpartition("/")
        with suppress(FileNotFoundError, LinkedFolderError):
            folder = open_folder(self._root, directory)
            try:
                nbytes = os.lstat(file, dir_fd=folder).st_size
                os.unlink(file, dir_fd=folder)
                return nbytes
            finally:
                os.close(folder)
        return None

    # -- files ---------------------------------------------------------------------------------------------------------

    def _read(self, name: str, into: Parts) -> Got:
        nbytes = len(into[0]) + len(into[1])
        direct = self._direct_flag(into)
        try:
            opened = self._open(name, direct)
        except FileNotFoundError:
            return Got.MISS
        if opened is None:
            return Got.MISS
        fd, found = opened
        try:
            # Through the page cache, reading the header alone makes the kernel read ahead while it copies.
            if found.st_size != nbytes or _move_all(os.preadv, fd, into, together=bool(direct)) != nbytes:
                return Got.WRONG_SIZE
            now_ns = self.clock.now_ns()
            if now_ns is not None and abs(now_ns - found.st_mtime_ns) > REFRESH_S * 1e9:
                _touch(fd)
            return Got.HIT
        finally:
            os.close(fd)

    def _open(self, name: str, direct: int) -> tuple[int, os.stat_result] | None:
        """Open a value to read it, with its status. Returns None if what has its name is no value. Raises OSError."""
        directory, _, file = name.rpartition("/")
        try:
            folder = open_inner_folder(self._root, directory)
            try:
                fd, found = open_with_status(file, os.O_RDONLY | direct, dir_fd=folder)
            finally:
                os.close(folder)
        except LinkedFolderError:
            self._say(name, _LINKED)
            return None
        except NotRegularError as error:
            self._say(name, f"it is {error.kind}")
            return None
        except BlockingIOError:
            self._say(name, "another process holds a lease of the file")
            return None
        if not self._is_trusted(found):
            os.close(fd)
            self._say(name, f"it belongs to the user {found.st_uid}, to whom the folder gives no rights")
            return None
        return fd, found

    def _is_trusted(self, found: os.stat_result) -> bool:
        """Return True if a file was written by someone to whom the directory gives rights."""
        return found.st_uid in self._owners or (bool(self._group_rights & 0o020) and found.st_gid == self._group_id)

    def _say(self, name: str, why: str) -> None:
        """Tell of something in the place of a value, once per kind."""
        if why not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(why)
            logger.warning(
                "kvkern: %(folder)s/%(name)s is in the place of a value: %(why)s. It counts as absent. The same of "
                "other values is not told. Find out who may write to the folder",
                {"event": "value_in_the_way", "folder": self._root, "name": name, "why": why},
            )  # fmt: skip

    def _direct_flag(self, parts: Parts) -> int:
        return os.O_DIRECT if self._direct and all(map(_is_aligned, parts)) else 0

    def _write(self, folder: int, file: str, value: Parts) -> None:
        fd = self._create_file(folder, file, self._direct_flag(value))
        try:
            if _move_all(os.pwritev, fd, value) != len(value[0]) + len(value[1]):
                raise OSError(errno.EIO, "written in part", file)
            if self._sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)  # raises errors that a network file system noticed late

    def _create_file(self, folder: int, file: str, flags: int) -> int:
        """Create a file that must not exist. Returns its descriptor."""
        fd = os.open(file, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        if self._group_rights & 0o060:
            try:
                os.fchmod(fd, 0o600 | self._group_rights & 0o060)
            except OSError:
                os.close(fd)
                raise
        return fd

    def _made_folder(self, directory: str) -> int:
        """Open a folder of values for `dir_fd`, and make it if there is none."""
        with suppress(FileNotFoundError):
            return open_folder(self._root, directory)
        self.check_root()
        path = f"{self._root}/{directory}"
        for folder in (self._root, path.rpartition("/")[0], path):
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
                if self._group_rights:
                    os.chmod(folder, stat.S_IMODE(os.stat(folder).st_mode) | self._group_rights)
        return open_folder(self._root, directory)

    # -- the directory -------------------------------------------------------------------------------------------------

    def _prepare(self) -> int:
        self._parent_device = os.stat(os.path.dirname(self._root)).st_dev
        with suppress(FileExistsError):
            os.mkdir(self._root, 0o700)
        status = os.stat(self._root)
        self._group_rights, self._group_id = status.st_mode & 0o070, status.st_gid
        self._is_mount = os.path.ismount(self._root)
        own_uid, has_room = self._probe(0)
        self._owners = {own_uid, status.st_uid, 0}
        self._direct = self._want_direct != "no" and self._probe(os.O_DIRECT)[1]
        if self._want_direct == "yes" and has_room and not self._direct:
            raise ConfigError(
                f"direct of file://{self._root} is yes, but its file system has no O_DIRECT. Use direct=auto"
            )
        for sentence in who_else_may_write(self._root, own_uid):
            logger.warning(
                "kvkern: file://%(folder)s: %(why)s. Who can write there can replace values by others that verify, "
                "and engines load them. Give a folder of this user's own (chmod 700), or of a group that shares it "
                "(chmod 2770)",
                {"event": "store_folder_open", "folder": self._root, "why": sentence},
            )  # fmt: skip
        self.clock.measure()
        disk = os.statvfs(self._root)
        return disk.f_frsize * disk.f_blocks

    def _probe(self, flags: int) -> tuple[int, bool]:
        """Write and read a file with these flags. Returns the file's owner, and True if it worked.

        The owner may be another than this process's user: a file server may map users. A full disk gives False.
        """
        file, owner = _temporary(), os.geteuid()
        try:
            folder = self._made_folder(os.path.dirname(file_name(bytes(32))))
        except OSError as error:
            if error.errno in _FULL:
                return owner, False
            raise
        with mmap.mmap(-1, _ALIGN) as page, memoryview(page) as memory:
            try:
                fd = self._create_file(folder, file, flags)
                try:
                    owner = os.fstat(fd).st_uid
                    return owner, _move_all(os.pwritev, fd, (memory,)) == _move_all(os.preadv, fd, (memory,)) == _ALIGN
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno in _FULL or (flags and error.errno in _NO_DIRECT):
                    return owner, False
                raise
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(file, dir_fd=folder)
                os.close(folder)

    def check_root(self) -> None:
        """Raise OSError if the file system is not mounted any more: values would fill the disk below the mount point."""
        try:
            os.stat(self._root)
            gone = self._is_mount and not os.path.ismount(self._root)
        except FileNotFoundError:
            gone = self._is_mount or os.stat(os.path.dirname(self._root)).st_dev != self._parent_device
        if gone:
            raise OSError(errno.ENODEV, "its file system is not mounted any more; mount it again", self._root)


def _temporary() -> str:
    return f".kvkern-{token_hex(8)}.tmp"


def _is_aligned(memory: memoryview) -> bool:
    if len(memory) % _ALIGN:
        return False
    return not len(memory) or np.frombuffer(memory, dtype=np.uint8).ctypes.data % _ALIGN == 0


def _touch(fd: int) -> None:
    try:
        os.utime(fd)  # a network file system uses the clock of its server
    except OSError as error:
        if error.errno not in _UNTOUCHED:
            raise


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
