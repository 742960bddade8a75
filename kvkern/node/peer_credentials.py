"""Identifies the process at the other end of a Unix socket, by what the kernel noted when it connected or listened.

These are facts of that moment: they do not change when the process changes its user, ends, or passes the socket on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from dataclasses import dataclass

_CREDENTIALS = struct.Struct("=iII")
_SO_PEERGROUPS = 59  # Linux 4.13; Python has no name for it
_FIRST_GROUPS = 64
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()  # supplementary groups


def peer_of(sock: socket.socket) -> Peer:
    """Return the process that connected to this socket, with its groups at that time. Raises OSError.

    On the connecting side it is the process that listens.
    """
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Peer(pid, uid, gid, _groups(sock.fileno()))


def _groups(fd: int) -> frozenset[int]:
    """Return the supplementary groups. None on a kernel that cannot tell them. Raises OSError."""
    room = _FIRST_GROUPS
    while True:  # Python's own getsockopt returns at most 1 KiB, and a process may have 65,536 groups
        found, length = (ctypes.c_uint32 * room)(), ctypes.c_uint32(4 * room)
        if _libc.getsockopt(fd, socket.SOL_SOCKET, _SO_PEERGROUPS, found, ctypes.byref(length)) == 0:
            return frozenset(found[: length.value // 4])
        code = ctypes.get_errno()
        if code in (errno.ENOPROTOOPT, errno.ENODATA):
            return frozenset()
        if code != errno.ERANGE:
            raise OSError(code, os.strerror(code))
        room = max(length.value // 4, 2 * room)
