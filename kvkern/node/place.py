"""A daemon's place on its host: the lock that makes it the only one, its socket, and who a peer is. Knows no messages."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError

_CREDENTIALS = struct.Struct("3i")


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


def unfinished(path: Path) -> bool:
    """Whether an arena was begun at `path` and its header, which comes last, is missing. Raises OSError."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not any(file.read(8))


def peer_of(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of who is at the other end."""
    return _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))


def groups_of(pid: int) -> frozenset[int]:
    """Supplementary groups of a process; none if it cannot be seen."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(int(gid) for line in lines if line.startswith("Groups:") for gid in line.split()[1:])
