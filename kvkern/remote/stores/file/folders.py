"""The folders of a store, opened without following links below its root. Knows no values.

    root / kvkern1 / ab     root itself may be a link: a user named it. kvkern1 and ab may not: what lies behind a link is on a
                            disk whose space nobody counts, or is a place that another user chose

A file in such a folder is named by the folder's descriptor, so that nobody can put a link in place meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat

_FLAGS = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LinkedFolderError(OSError):
    """A folder of the store is a link, or no folder."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.ENOTDIR, "it is a link or no folder; remove it", path)


def open_folder(root: str, directory: str, flags: int = os.O_PATH) -> int:
    """Open `kvkern1` or `kvkern1/ab` below the root. Returns a descriptor, for `dir_fd`; the caller closes it.

    Raises FileNotFoundError if there is none, LinkedFolderError, and the other OSErrors of the system.
    """
    outer, _, inner = directory.partition("/")
    path = f"{root}/{outer}"
    try:
        fd = os.open(path, (os.O_PATH if inner else flags) | _FLAGS)
        if not inner:
            return fd
        path = f"{root}/{directory}"
        try:
            return os.open(inner, flags | _FLAGS, dir_fd=fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and _is_in_the_way(path):
            raise LinkedFolderError(path) from error
        raise


def open_inner_folder(root: str, directory: str) -> int:
    """Like `open_folder` for `kvkern1/ab`, to read: that `kvkern1` is no link was checked when the store was opened.

    It saves two system calls. Whoever writes uses `open_folder`.
    """
    path = f"{root}/{directory}"
    try:
        return os.open(path, os.O_PATH | _FLAGS)
    except NotADirectoryError as error:
        if _is_in_the_way(path):
            raise LinkedFolderError(path) from error
        raise


def who_else_may_write(root: str, own_uid: int) -> list[str]:
    """Return who, beside this user, root and the group of the folder, can change values. One sentence each.

    `own_uid` is this user as the file system sees him. A folder that gives rights to its group is shared on purpose.
    """
    found = []
    for path in (os.path.dirname(root), root, f"{root}/kvkern1"):
        try:
            status = os.stat(path)
        except OSError:
            continue
        mode = status.st_mode
        # Where the sticky bit is set, others can add names of their own but cannot rename or remove this user's.
        if mode & stat.S_IWOTH and (path.endswith("/kvkern1") or not mode & stat.S_ISVTX):
            found.append(f"every user may write to {path} (mode {stat.S_IMODE(mode):o})")
        elif path != os.path.dirname(root) and status.st_uid not in (own_uid, 0) and not mode & stat.S_IWGRP:
            found.append(f"{path} belongs to the user {status.st_uid}, this process runs as {own_uid}")
    return found


def _is_in_the_way(path: str) -> bool:
    try:
        return not stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False
