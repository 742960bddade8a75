"""Identifies a process by its pid and its start time, read from /proc. The kernel reuses pids, so a pid alone is not enough."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID


def process_start(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot, or 0 if it has ended."""
    state, start = _process_stat(pid)
    return start if state not in ("", "Z", "X") else 0  # a zombie has no memory mapped any more


def process_alive(pid: int, start: int) -> bool:
    """Return True if the process with this pid and start time can still access memory."""
    return start != 0 and process_start(pid) == start


def _process_stat(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    rest = fields.rsplit(")", 1)[1].split()
    return rest[0], int(rest[19])


def boot_id() -> bytes:
    """Return 16 bytes that name this boot of the machine. Start times of processes are comparable within it. Zeros: unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return UUID(file.read().strip().decode()).bytes
    except (OSError, ValueError):
        return bytes(16)
