"""Identifies a process by its pid and its start time, read from /proc. The kernel reuses pids, so a pid alone is not enough.

A process chooses its own name, and the name stands in the file that is read here. So it is read as bytes: a name may be cut
in the middle of a letter, and may contain spaces, brackets and line breaks.
"""

from __future__ import annotations

import os
from uuid import UUID


def process_start(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot, or 0 if it has ended.

    Raises OSError if that cannot be read, because this user may not see it or has too many open files.
    """
    state, start = _process_stat(pid)
    return start if state not in (b"", b"Z", b"X") else 0  # a zombie has no memory mapped any more


def process_alive(pid: int, start: int) -> bool:
    """Return True if the process with this pid and start time can still access memory, or if nobody can tell now.

    Raises nothing: who asks this regularly asks again.
    """
    try:
        return start != 0 and process_start(pid) == start
    except OSError:
        return True


def _process_stat(pid: int) -> tuple[bytes, int]:
    """Return (state, start time), or (b"", 0) if there is no such process. Raises OSError."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return b"", 0
    try:
        found = os.read(fd, 4096)  # the name has at most 64 bytes, the 50 numbers at most 20 digits each
    except ProcessLookupError:
        return b"", 0
    finally:
        os.close(fd)
    fields = found.rpartition(b")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else (b"", 0)


def boot_id() -> bytes:
    """Return 16 bytes that name this boot of the machine. Start times of processes are comparable within it. Zeros: unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return UUID(file.read().strip().decode()).bytes
    except (OSError, ValueError):
        return bytes(16)
