"""Tells how much of the machine others used meanwhile. Knows Linux's CPU counters; knows nothing of benches.

    others = (busy time of all CPUs - CPU time of this process and of its ended children) / wall time

Children whose parent did not wait for them count as others: a small figure may be our own, a large one is not.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
IDLE_FIELDS = (3, 4)  # of the first line: idle and iowait
SUMMED_FIELDS = 8  # user nice system idle iowait irq softirq steal; guest time is in user already


class Others:
    """Counts from its creation."""

    def __init__(self) -> None:
        self._busy_s, self._own_s, self._started_s = busy_s(), own_s(), time.monotonic()

    def cpus(self) -> float:
        """Return how many CPUs others kept busy on average since the creation. Call when all children have ended."""
        wall_s = time.monotonic() - self._started_s
        return max(0.0, (busy_s() - self._busy_s) - (own_s() - self._own_s)) / wall_s


def busy_s() -> float:
    """Return the seconds that all CPUs together have not idled since the machine's start."""
    ticks = [int(word) for word in STAT.read_text().splitlines()[0].split()[1 : 1 + SUMMED_FIELDS]]
    return (sum(ticks) - sum(ticks[field] for field in IDLE_FIELDS)) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
