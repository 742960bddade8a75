"""Reads how much memory this machine or container has left for an arena."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int:
    """Return the bytes that this process can still allocate: the smaller of MemAvailable and the cgroup's remaining limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (FileNotFoundError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)
