"""Finds the memory nodes of this host that a process runs on, by its CPUs. Reads sysfs; asks no device."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

_SYSFS = Path("/sys/devices/system/node")


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Return the numbers in a list such as `0-3,8`."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return tuple(n for low, _, high in ranges for n in range(int(low), int(high or low) + 1))


def process_nodes(cpus: Collection[int] | None = None, sysfs: Path = _SYSFS) -> tuple[int, ...]:
    """Return the nodes that have any of these CPUs, by default the CPUs that this thread may run on; () without NUMA.

    It does not see a memory policy that is set alone (`numactl --membind` without `--cpunodebind`).
    """
    mine = set(os.sched_getaffinity(0) if cpus is None else cpus)
    found = []
    for folder in sysfs.glob("node[0-9]*"):
        try:
            theirs = parse_cpu_list((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if mine.intersection(theirs):
            found.append(int(folder.name[4:]))
    return tuple(sorted(found))
