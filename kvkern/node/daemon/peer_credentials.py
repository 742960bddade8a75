"""Identifies the process at the other end of a Unix socket, by what the kernel reports."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_CREDENTIALS = struct.Struct("3i")


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the process at the other end."""
    return _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))


def supplementary_groups(pid: int) -> frozenset[int]:
    """Return the supplementary groups of a process. Empty if the process cannot be seen."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(int(gid) for line in lines if line.startswith("Groups:") for gid in line.split()[1:])
