"""Opens files that another user could have put in place. Only a regular file is opened, and no open waits.

    O_NONBLOCK    a FIFO without another end cannot hold the caller for ever
    O_NOFOLLOW    a link under the file's name is refused, unless the caller allows links
    fstat         what was opened is a regular file: no FIFO, socket, device or folder

Knows no contents. A file that is opened here to be written is truncated only after it was found to be a regular file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip

_ALWAYS = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

StrPath = str | os.PathLike[str]


class NotRegularError(OSError):
    """What has the file's name is no regular file. `strerror` says what it is and what to do; `errno` is EINVAL."""

    def __init__(self, kind: str, path: StrPath) -> None:
        self.kind = kind  # "a FIFO" and the like
        super().__init__(errno.EINVAL, f"it is {kind}, not a regular file; remove it or give another path", str(path))


def open_regular(
    path: StrPath,
    flags: int = os.O_RDONLY,  # of os.open; O_NONBLOCK, O_NOFOLLOW, O_CLOEXEC and O_NOCTTY are added
    mode: int = 0o600,  # of a file that is created
    *,
    follow_links: bool = False,  # True: for a path that the user gave and may have linked
    dir_fd: int | None = None,  # of the folder that a relative path is in
) -> int:
    """Open a regular file. Returns its descriptor, which the caller closes. Never waits for another process.

    Raises NotRegularError if something else has this name, and the other OSErrors of the system.
    """
    return open_with_status(path, flags, mode, follow_links=follow_links, dir_fd=dir_fd)[0]


def open_with_status(
    path: StrPath, flags: int, mode: int = 0o600, *, follow_links: bool = False, dir_fd: int | None = None
) -> tuple[int, os.stat_result]:
    """Like `open_regular`, and return the file's status too."""
    follow = 0 if follow_links else os.O_NOFOLLOW
    try:
        fd = os.open(path, flags & ~os.O_TRUNC | follow | _ALWAYS, mode, dir_fd=dir_fd)
    except OSError as error:
        mode = _mode(path, follow_links, dir_fd) if error.errno in _OF_A_KIND else stat.S_IFREG
        if stat.S_ISREG(mode):
            raise
        raise NotRegularError(kind_of(mode), path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NotRegularError(kind_of(status.st_mode), path)
        if flags & os.O_TRUNC:
            os.ftruncate(fd, 0)
    except OSError:
        os.close(fd)
        raise
    return fd, status


def read_regular(path: StrPath, most_nbytes: int, *, follow_links: bool = False) -> bytes:
    """Return the content of a regular file. Raises OSError: NotRegularError, or EFBIG for more than `most_nbytes`."""
    with os.fdopen(open_regular(path, follow_links=follow_links), "rb") as file:
        content = file.read(most_nbytes + 1)
    if len(content) > most_nbytes:
        raise OSError(errno.EFBIG, f"it has more than {most_nbytes} bytes; give another path", str(path))
    return content


def write_regular(path: Path, content: bytes, mode: int = 0o600, *, suffix: str = "new", sync: bool = False) -> None:
    """Replace a file in one step, by a new file of this mode: a reader gets the old content or the new one.

    The new file is `.NAME.SUFFIX` first: callers that write at the same time need different suffixes or a lock. A link under
    either name is replaced, not followed. Raises OSError; nothing is left behind then.
    """
    new = path.with_name(f".{path.name}.{suffix}")
    try:
        new.unlink(missing_ok=True)  # of a process that was killed
        with os.fdopen(open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


_OF_A_KIND = {  # errors of an open that finds no regular file; EINVAL: a folder, with O_DIRECT
    errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.EOPNOTSUPP,
}  # fmt: skip


def kind_of(mode: int) -> str:
    """Return what a file with this `st_mode` is, for a message: "a folder" and the like."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _mode(path: StrPath, follow_links: bool, dir_fd: int | None) -> int:
    """Return the `st_mode` of a path. If it cannot be known, that of a regular file."""
    try:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=follow_links).st_mode
    except OSError:
        return stat.S_IFREG
