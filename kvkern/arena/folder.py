"""The folder of a user's arenas: one that no other user can write, so that nobody else can take the names in it.

    arena_dir belongs to this user or root, and nobody else may write it   -> the arenas lie in arena_dir
    any other, such as /dev/shm                                            -> in arena_dir/kvkern-<uid>, with mode 0700

If another user has taken that name, the folder is arena_dir/kvkern-<uid>-<16 random hex digits>. The digits are kept in a file
of the user's cache folder, so that all processes of the user find the same folder. A folder below arena_dir is made when an
arena needs it, and is removed with the last file in it. This module knows names and owners, and nothing of an arena's bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from pathlib import Path
from secrets import token_hex

from ..config import user_cache_dir
from ..errors import ArenaError
from ..regular_files import kind_of, open_regular, read_regular

_SUFFIX = re.compile("[0-9a-f]{16}")


def arena_prefix(uid: int) -> str:
    """Return the first part of the names of a user's arenas. There is one arena per uid and trust domain."""
    return f"kvkern-{uid}-"


def arena_folder(directory: Path) -> Path:
    """Return the folder that holds this user's arenas, or will hold them; see the module. It may not exist yet.

    Raises ArenaError, which names the owner, if another user has taken its name and no other name can be noted down.
    """
    if not _others_may_write(directory):
        return directory
    plain = directory / f"kvkern-{os.getuid()}"
    if _is_mine(plain):
        return plain
    suffix = _noted_suffix()
    if suffix and _is_mine(noted := plain.with_name(f"{plain.name}-{suffix}")):
        return noted
    if not os.path.lexists(plain):
        return plain
    suffix = suffix or _note_suffix()
    noted = plain.with_name(f"{plain.name}-{suffix}")
    if not suffix or os.path.lexists(noted):
        raise ArenaError(
            f"{'the folder of the arenas cannot be made: ' if not suffix else ''}{taken(noted if suffix else plain)}"
        )
    return noted


def make_private_folder(folder: Path) -> bool:
    """Make a folder that `arena_folder` named, for this user alone. Returns False if another user was faster."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    return _is_mine(folder)


def is_private_folder(folder: Path) -> bool:
    """Return True if `folder` has a name that `arena_folder` makes up. Then kvkern makes and removes it."""
    name, own = folder.name, f"kvkern-{os.getuid()}"
    return name == own or (name.startswith(f"{own}-") and _SUFFIX.fullmatch(name[len(own) + 1 :]) is not None)


def remove_if_empty(folder: Path) -> None:
    """Remove a private folder, unless files are in it. Leaves any other folder alone. Never raises."""
    if is_private_folder(folder):
        with contextlib.suppress(OSError):
            folder.rmdir()


def sweep_stale(directory: Path, prefix: str) -> list[Path]:
    """Unlink this user's arenas that no process maps any more. Returns the removed paths. Never raises.

    Leaves what it may not remove, and what belongs to other users or is no file.
    """
    removed = []
    try:
        names = sorted(name for name in os.listdir(directory) if name.startswith(prefix))
    except OSError:
        return []
    for path in (directory / name for name in names):
        with contextlib.suppress(OSError):
            if _unlink_unused(path):
                removed.append(path)
    if removed:
        remove_if_empty(directory)
    return removed


def _unlink_unused(path: Path) -> bool:
    """Unlink a file of this user that no process has locked. Raises OSError if a process maps it or it cannot be removed."""
    fd = open_regular(path, os.O_RDWR)
    try:
        if os.fstat(fd).st_uid != os.getuid():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not still_named(fd, path):
            return False
        path.unlink()
        return True
    finally:
        os.close(fd)


def still_named(fd: int, path: Path) -> bool:
    """Return True if `path` is still the name of the opened file: it was neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def taken(path: Path) -> str:
    """Return the message for a name that belongs to another user, or to something that is no file: its owner and the remedy."""
    try:
        found = path.lstat()
    except OSError as error:
        return (
            f"{path} cannot be examined: {error.strerror}; set arena_dir (kvkern serve --arena-dir) to another folder"
        )
    kind = kind_of(found.st_mode)
    if found.st_uid == os.getuid():
        return f"{path} is {kind}; remove it, or set arena_dir (kvkern serve --arena-dir) to another folder"
    return (
        f"{path} is {kind} of uid {found.st_uid}, but this process is uid {os.getuid()}: another user has taken the name. "
        f"Have its owner or root remove it, or set arena_dir (kvkern serve --arena-dir) to a folder that only uid "
        f"{os.getuid()} can write, such as one that `mkdir -m 700` makes"
    )


def _others_may_write(directory: Path) -> bool:
    """Return True if a user other than this one and root can make files in the folder. False if it cannot be examined."""
    try:
        found = directory.stat()
    except OSError:
        return False
    return found.st_uid not in (0, os.getuid()) or bool(found.st_mode & 0o022)


def _is_mine(folder: Path) -> bool:
    """Return True if `folder` is a folder of this user and no link. Takes from it what other users may do in it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(fd, 0o700)
        return found.st_uid == os.getuid()
    finally:
        os.close(fd)


def _suffix_file() -> Path:
    return user_cache_dir() / "arena-folder"


def _noted_suffix() -> str:
    """Return the noted suffix of the folder's name, or an empty string if there is none that only this user can have noted."""
    path = _suffix_file()
    try:
        found = path.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            return ""
        text = read_regular(path, 64).decode("ascii", "replace").strip()
    except OSError:
        return ""
    return text if _SUFFIX.fullmatch(text) else ""


def _note_suffix() -> str:
    """Note a new suffix, unless another process has just noted one. Returns an empty string if none can be noted."""
    path = _suffix_file()
    new = path.with_name(f".{path.name}.{token_hex(8)}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
                file.write(token_hex(8))
            os.link(new, path)
        except FileExistsError:
            pass  # another process was faster
        finally:
            new.unlink(missing_ok=True)
    return _noted_suffix()
