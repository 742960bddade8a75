"""Names a process for good: its pid and its start time. Reads /proc; a pid alone is used again."""

from __future__ import annotations

from pathlib import Path


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 if it is gone. With the pid it names a process for good."""
    state, start = _process_stat(pid)
    return start if state not in ("", "Z", "X") else 0  # a zombie has given its memory back


def process_alive(pid: int, start: int) -> bool:
    """Whether the process with this pid and start time may still touch memory."""
    return start != 0 and process_start(pid) == start


def _process_stat(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    rest = fields.rsplit(")", 1)[1].split()
    return rest[0], int(rest[19])
