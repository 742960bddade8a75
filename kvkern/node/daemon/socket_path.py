"""A daemon's place on its host: the lock that makes it the only one, its socket, and who a peer is. Knows no messages."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ...errors import ConfigError


@contextlib.contextmanager
def only_one(path: Path, option: str) -> Iterator[None]:
    """Hold the lock file beside `path`: at most one daemon has it, and the lock dies with the daemon. Raises ConfigError."""
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


def bind(path: Path) -> socket.socket:
    """A listening socket, for the owner and the group. Call with the lock of `path` held. Raises ConfigError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    mask = os.umask(0o117)
    try:
        if path.is_socket() and not path.is_symlink():
            path.unlink()  # a daemon's that is gone: this one holds the lock
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
