"""Room for an arena: checks that there is enough, reserves every page, and says why a file cannot be made or opened.

A page that is not reserved when the file system is full is a SIGBUS for the process that touches it. So all pages are
reserved when the arena is made, also those that are touched later. Knows paths and sizes; no slots, no headers.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..config import format_nbytes
from ..errors import ArenaError
from ..regular_files import NotRegularError
from .folder import taken
from .free_memory import free_memory
from .mapping import populate

Progress = Callable[[str], None]

_PIECE = 256 << 20  # of one call: an interrupt or a kill takes effect between two calls
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
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
    errno.ENOMEM: "lower `capacity`, or give this process more memory",
    errno.ENOLCK: "use an arena_dir whose file system has locks, such as a tmpfs",
}


@contextmanager
def faults_of(
    path: Path,
    verb: str,  # what fails: "made", "opened"
    nbytes: int | None = None,  # of the arena; None: not known yet
) -> Iterator[None]:
    """Turn an OSError of the arena's file or folder into an ArenaError with the path, the size and the remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NotRegularError) or (error.errno in (errno.EACCES, errno.EPERM) and _is_foreign(path)):
            raise ArenaError(f"arena {path} cannot be {verb}: {taken(path)}") from error
        size = "" if nbytes is None else f" (it takes {format_nbytes(nbytes)})"
        remedy = _REMEDIES.get(error.errno or 0, "look at the folder, or use another arena_dir")
        raise ArenaError(
            f"arena {path} cannot be {verb}: {error.strerror}{size}; {remedy.format(uid=os.getuid())}"
        ) from error


def check_owner(fd: int, path: Path) -> None:
    """Raise ArenaError if the opened file belongs to another user, who could read all of it."""
    if os.fstat(fd).st_uid != os.getuid():
        raise ArenaError(f"arena {path} cannot be used: {taken(path)}")


def check_room(nbytes: int, path: Path) -> None:
    """Raise ArenaError if the file system or the memory has less than `nbytes` to spare."""
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


def missing_nbytes(fd: int, nbytes: int) -> int:
    """Return how many of the file's `nbytes` have no page: the file ends before them, or they are holes. 0: it is whole."""
    found = os.fstat(fd)
    return max(0, nbytes - min(found.st_size, found.st_blocks * 512))


def allocate(fd: int, memory: npt.NDArray[np.uint8], path: Path, prefault: bool, progress: Progress) -> None:
    """Reserve all pages of a mapped file, and touch them with `prefault`. Pages that are there keep their bytes.

    Raises ArenaError if there is no room, or if the file system cannot reserve, and OSError if a page cannot be touched.
    """
    start, nbytes = time.monotonic(), len(memory)
    for offset, done in _pieces(nbytes):
        _reserve(fd, offset, done, nbytes, path)
        if prefault:
            populate(memory[offset:done])
        if done % (16 * _PIECE) == 0 or done == nbytes:
            seconds = time.monotonic() - start
            progress(f"arena: {format_nbytes(done)} of {format_nbytes(nbytes)} ready after {seconds:.1f} s")


def reserve(fd: int, nbytes: int, path: Path) -> None:
    """Reserve all pages of a file. Pages that are there keep their bytes. Raises ArenaError, see `allocate`."""
    for offset, done in _pieces(nbytes):
        _reserve(fd, offset, done, nbytes, path)


def _pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    return ((offset, min(offset + _PIECE, nbytes)) for offset in range(0, nbytes, _PIECE))


def _reserve(fd: int, offset: int, done: int, nbytes: int, path: Path) -> None:
    try:
        os.posix_fallocate(fd, offset, done - offset)
    except OSError as error:
        if error.errno in _CANNOT_RESERVE:
            raise ArenaError(
                f"{path.parent} is on a file system that cannot reserve memory for the arena ({error.strerror}), so an "
                f"engine could end with SIGBUS; use an arena_dir on a tmpfs, such as /dev/shm"
            ) from error
        raise ArenaError(_no_room(nbytes, path, f"the kernel says: {error.strerror}")) from error


def _is_foreign(path: Path) -> bool:
    try:
        return path.lstat().st_uid != os.getuid()
    except OSError:
        return False


def _no_room(nbytes: int, path: Path, why: str) -> str:
    return (
        f"the arena needs {format_nbytes(nbytes)} in {path.parent}, but {why}. Lower `capacity`, or enlarge the mount "
        f"(mount -o remount,size=..., docker run --shm-size=..., an emptyDir with medium: Memory in Kubernetes)"
    )
