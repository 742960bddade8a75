"""A memory cgroup below this process's own, for tests that run a child in it. Version 1 and 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class MemoryGroup:
    """A group. A child that writes "0" to `path / "cgroup.procs"` is in it."""

    path: Path
    limit: Path  # its file with the limit in bytes
    used: Path  # its file with the bytes in use


@contextmanager
def memory_group(nbytes: int) -> Iterator[MemoryGroup]:
    """Make a group with this limit and remove it in the end. Skips the test if this process may not."""
    own = {kinds: path for _, kinds, path in (
        line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())}  # fmt: skip
    if "memory" in own:
        parent, limit, used = (
            Path(f"/sys/fs/cgroup/memory{own['memory']}"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        )
    else:
        parent, limit, used = Path(f"/sys/fs/cgroup{own.get('', '/')}"), "memory.max", "memory.current"
    path = parent / f"kvkern-test-{os.getpid()}"
    try:
        path.mkdir()
        (path / limit).write_text(str(nbytes))
    except OSError as error:
        if path.exists():
            path.rmdir()
        pytest.skip(f"this process may not make a memory group in {parent}: {error.strerror}")
    try:
        yield MemoryGroup(path, path / limit, path / used)
    finally:
        path.rmdir()
