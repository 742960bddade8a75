"""Reads how much memory this machine or container has left for an arena. Knows cgroups, version 1 and 2; nothing of slots.

    free of a group = limit - used + page cache         the kernel drops page cache of files before it kills a process
    free            = the least of MemAvailable and of this process's group and every group above it

A group's files are below a mount point that /proc/self/mountinfo names. /proc/self/cgroup names the group. A container often
sees its own group as the top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..config import format_nbytes

_UNLIMITED = 1 << 60  # a cgroup of version 1 without a limit has the largest page-aligned int64


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Memory that this process can still allocate."""

    nbytes: int
    source: str  # what sets the limit, with its numbers, to go after "only 5 MiB are free"


@dataclass(frozen=True, slots=True)
class _Version:
    """The names of one version's files, and of the fields of memory.stat that count page cache of the group and those below."""

    limit: str
    used: str
    cache: tuple[str, ...]


_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Version("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory(root: Path = Path("/")) -> FreeMemory:
    """Return the memory that is left, and what limits it. `root` is the folder that holds proc and sys."""
    groups = (found for version, folder in _groups(root) if (found := _free_of_group(version, folder)) is not None)
    return min((_free_of_machine(root), *groups), key=lambda found: found.nbytes)


def _free_of_machine(root: Path) -> FreeMemory:
    sizes = {name: text.split() for name, _, text in (line.partition(":") for line in _lines(root / "proc/meminfo"))}
    for name in ("MemAvailable", "MemFree"):  # Linux before 3.14 has no MemAvailable
        if name in sizes:
            return FreeMemory(int(sizes[name][0]) << 10, f"on this machine ({name} of /proc/meminfo)")
    return FreeMemory(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "on this machine (free pages)")


def _free_of_group(version: _Version, folder: Path) -> FreeMemory | None:
    """Return what is left below a group's limit, or None if it has no limit."""
    limit, used = _number(folder / version.limit), _number(folder / version.used)
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    cache = min(used, sum(int(stat.get(name, 0)) for name in version.cache))
    return FreeMemory(
        max(0, limit - used + cache),
        f"below the memory limit of {folder}: {format_nbytes(limit)}, of which {format_nbytes(used - cache)} are in use",
    )


def _groups(root: Path) -> Iterator[tuple[_Version, Path]]:
    """Yield this process's memory groups, each with all groups above it that are mounted."""
    paths = {kinds: path for _, kinds, path in (line.split(":", 2) for line in _lines(root / "proc/self/cgroup"))}
    own = {_V2: paths.get(""), _V1: next((path for kinds, path in paths.items() if "memory" in kinds.split(",")), None)}
    seen: set[_Version] = set()
    for line in _lines(root / "proc/self/mountinfo"):
        head, _, tail = line.partition(" - ")
        top, mount = (_unescaped(text) for text in head.split()[3:5])
        kind, _, options = tail.split()[:3]
        version = _V2 if kind == "cgroup2" else _V1 if kind == "cgroup" and "memory" in options.split(",") else None
        if version is None or version in seen or (path := own[version]) is None:
            continue
        seen.add(version)
        # A mount may show a part of the tree. A group outside that part is not visible: take the part's top.
        inside = PurePosixPath(path)
        below = inside.relative_to(top) if inside.is_relative_to(top) and ".." not in inside.parts else PurePosixPath()
        folder = root / mount.lstrip("/")
        for part in (below, *below.parents):
            yield version, folder / part


def _unescaped(text: str) -> str:
    return text.replace("\\040", " ")


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no file, or if it says `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return os.fsdecode(path.read_bytes()).splitlines()  # names of mounts and groups may be no UTF-8
    except OSError:
        return []
