"""A daemon's files on its host: the lock that makes it the only daemon, and its listening socket. Knows no messages."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ...arena.folder import is_private_folder, make_private_folder, still_named
from ...errors import ConfigError
from ...regular_files import NotRegularError, open_regular

WAITING_CONNECTIONS = 4096  # that the daemon has not looked at yet; the kernel allows no more by default


@contextlib.contextmanager
def exclusive_lock(path: Path, option: str) -> Iterator[None]:
    """Hold the lock file beside `path`. At most one daemon holds it, and it is released when the daemon dies.

    Removes the lock file at the end if nothing is at `path` then. Raises ConfigError, which tells the user to choose another
    `option`, and names the owner if another user has taken the lock file's name.
    """
    lock = path.with_name(f".{path.name}.lock")
    fd = _locked(lock, path, option)
    try:
        yield
    finally:
        if not os.path.lexists(path):
            with contextlib.suppress(OSError):
                lock.unlink()
        os.close(fd)


def _locked(lock: Path, path: Path, option: str) -> int:
    """Return the descriptor of the locked file. Raises ConfigError."""
    while True:
        fd = _open_lock(lock, option)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if still_named(fd, lock):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise ConfigError(f"another daemon already has {path}; stop it, or choose another {option}") from error
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"{lock} cannot be locked: {error.strerror}; choose another {option}") from error
        os.close(fd)  # the daemon that had it has just ended and removed the file


def _open_lock(lock: Path, option: str) -> int:
    """Open a lock file of this user, and create it, and its folder if kvkern makes that. Raises ConfigError."""
    while True:
        try:
            fd = open_regular(lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            folder = lock.parent
            if isinstance(error, FileNotFoundError) and is_private_folder(folder) and make_private_folder(folder):
                continue
            raise ConfigError(f"{lock} cannot be opened: {_why(lock, error)}, or choose another {option}") from error
        if os.fstat(fd).st_uid in (0, os.getuid()):
            return fd
        os.close(fd)
        raise ConfigError(f"{lock} cannot be used: {_why(lock, PermissionError())}, or choose another {option}")


def _why(path: Path, error: OSError) -> str:
    """Say why a path cannot be used, and what to do."""
    try:
        owner = path.lstat().st_uid
    except OSError:
        owner = os.getuid()
    if owner != os.getuid():
        return (
            f"it belongs to uid {owner}, and this process is uid {os.getuid()}: another user has taken the name. Let its "
            f"owner or root remove it, use a folder that only uid {os.getuid()} can write"
        )
    return str(error.strerror) if isinstance(error, NotRegularError) else f"{error.strerror}; create the folder"


def listening_socket(path: Path) -> socket.socket:
    """Return a listening socket that the owner and the group may open. Call with the lock of `path` held.

    Raises ConfigError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    mask = os.umask(0o117)
    try:
        if path.is_socket() and not path.is_symlink():
            path.unlink()  # left by a daemon that is gone, because this one holds the lock
        elif os.path.lexists(path):
            raise ConfigError(f"{path} exists and is no socket; remove it, or choose another --socket")
        sock.bind(str(path))
        sock.listen(WAITING_CONNECTIONS)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {path}: {error.strerror}; create the folder, or choose another --socket"
        ) from error
    except ConfigError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock
