"""Measures how many CPUs other processes used meanwhile. Knows Linux's CPU counters; knows nothing of benches.

    busy CPUs of others = (busy time of all CPUs - CPU time of this process and of its ended children) / wall time

Children whose parent did not wait for them count as other processes. A small figure may therefore come from our own
children; a large one does not.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
IDLE_FIELDS = (3, 4)  # of the first line: idle and iowait
SUMMED_FIELDS = 8  # user nice system idle iowait irq softirq steal; user already includes guest time


class OtherProcesses:
    """The CPU time of all other processes since this object was created."""

    def __init__(self) -> None:
        self._busy_s, self._own_s, self._started_s = busy_s(), own_s(), time.monotonic()

    def busy_cpus(self) -> float:
        """Return how many CPUs other processes kept busy on average. Call when all children have ended."""
        wall_s = time.monotonic() - self._started_s
        return max(0.0, (busy_s() - self._busy_s) - (own_s() - self._own_s)) / wall_s


def busy_s() -> float:
    """Return the busy seconds of all CPUs together since the machine's start."""
    ticks = [int(word) for word in STAT.read_text().splitlines()[0].split()[1 : 1 + SUMMED_FIELDS]]
    return (sum(ticks) - sum(ticks[field] for field in IDLE_FIELDS)) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """Return the CPU seconds of this process and of its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
