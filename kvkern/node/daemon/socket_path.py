"""A daemon's files on its host: the lock that makes it the only daemon, and its listening socket. Knows no messages."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ...errors import ConfigError


@contextlib.contextmanager
def exclusive_lock(path: Path, option: str) -> Iterator[None]:
    """Hold the lock file beside `path`. At most one daemon holds it, and it is released when the daemon dies.

    Raises ConfigError, which tells the user to choose another `option`.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{lock} cannot be opened: {error.strerror}; create the folder, or choose another {option}"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ConfigError(f"another daemon already has {path}; stop it, or choose another {option}") from error
    try:
        yield
    finally:
        os.close(fd)


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
        sock.listen(64)
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
