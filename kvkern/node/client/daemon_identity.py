"""Checks who serves on a socket, and whose arena it passes, before a byte is stored there.

Where others may make files, as in a folder like /tmp, another user can serve on the socket's path while the daemon is away.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from ...errors import ArenaError, ConfigError
from ..peer_credentials import peer_of


def check_daemon(
    sock: socket.socket,
    path: Path,
    daemon_uid: int,  # a user that may serve, beside root and this process's own; negative: none
) -> int:
    """Return the uid of the process that serves on a connected socket. Raises ConfigError if it may not, and OSError."""
    uid = peer_of(sock).uid
    if uid not in (0, os.getuid()) and uid != max(daemon_uid, -1):
        expected = f"uid {os.getuid()} or root" if daemon_uid < 0 else f"uid {daemon_uid}, uid {os.getuid()} or root"
        raise ConfigError(
            f"uid {uid} serves on {path}, but {expected} is expected, and who serves there can read what this process stores. "
            f"If uid {uid} is the user of your daemon, say so: daemon_uid {uid} among an engine's options, --daemon-uid {uid} "
            f"for a command. Otherwise give the daemon a socket in a folder in which only its user can make files"
        )
    return uid


def check_arena(
    fd: int,
    path: Path,  # for messages
    daemon_uid: int,  # the user that serves on the socket
) -> None:
    """Raise ArenaError if the file is not the daemon's own, or if other users can open it."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        wrong = "it is no regular file"
    elif found.st_uid != daemon_uid:
        wrong = f"it belongs to uid {found.st_uid}, but uid {daemon_uid} serves on the socket"
    elif found.st_mode & 0o077:
        wrong = f"other users may open it (mode {stat.S_IMODE(found.st_mode):04o}, expected 0600)"
    else:
        return
    raise ArenaError(f"arena {path} is not used, because {wrong}; end the daemon, remove the file, and start it again")
