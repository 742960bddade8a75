"""The memory that is left, from an invented /proc and /sys, and in a real group with a limit, if this process may make one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkern.arena.free_memory import free_memory
from tests.memory_group import memory_group

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 1 << 20, 1 << 30
MEMINFO = "MemTotal: 67108864 kB\nMemFree: 1048576 kB\nMemAvailable: 33554432 kB\n"  # 64, 1 and 32 GiB
V2_MOUNT = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "33 31 0:30 {top} /sys/fs/cgroup/memory rw,relatime shared:12 - cgroup cgroup rw,memory\n"
OTHER_MOUNTS = (
    "22 27 0:21 / /proc rw - proc proc rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
)


def invented(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(group: str, limit: object, used: int, active: int = 0, inactive: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup{group}".rstrip("/")
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\nfile {active + inactive + GIB}\nshmem {GIB}\ninactive_file {inactive}\n"
        f"active_file {active}\n",
    }


def v1(group: str, limit: int, used: int, cache: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory{group}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"cache 1\ninactive_file 1\nactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file 0\n",
    }


IN_V2 = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": OTHER_MOUNTS + V2_MOUNT.format(top="/")}
UNIT = {
    "proc/self/cgroup": "0::/system.slice/kvkern.service\n",
    "proc/self/mountinfo": OTHER_MOUNTS + V2_MOUNT.format(top="/"),
}
V1_LINES = "9:name=systemd:/docker/ab\n4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n0::/\n"
IN_V1 = {"proc/self/cgroup": V1_LINES, "proc/self/mountinfo": OTHER_MOUNTS + V1_MOUNT.format(top="/docker/ab")}
NO_LIMIT_V1 = 9223372036854771712

CASES: dict[str, tuple[dict[str, str], int, str]] = {
    "no cgroups": ({}, 32 * GIB, "MemAvailable"),
    "an old kernel": ({"proc/meminfo": "MemFree: 1048576 kB\n"}, GIB, "MemFree"),
    "no limit": ({**IN_V2, **v2("/", "max", 5 * GIB)}, 32 * GIB, "MemAvailable"),
    "a container": ({**IN_V2, **v2("/", 8 * GIB, 5 * GIB)}, 3 * GIB, "/sys/fs/cgroup: 8 GiB, of which 5 GiB are in use"),
    "a container full of page cache": (
        {**IN_V2, **v2("/", 8 * GIB, 8 * GIB - 100 * MIB, 3 * GIB, 4 * GIB)}, 7 * GIB + 100 * MIB, "of which 924 MiB are",
    ),
    "more than its limit": ({**IN_V2, **v2("/", GIB, 2 * GIB)}, 0, "1 GiB, of which 2 GiB are in use"),
    "a limit above the machine": ({**IN_V2, **v2("/", 128 * GIB, GIB)}, 32 * GIB, "MemAvailable"),
    "a systemd unit": (
        {**UNIT, **v2("/system.slice/kvkern.service", 4 * GIB, GIB), **v2("/system.slice", "max", 9 * GIB)},
        3 * GIB, "system.slice/kvkern.service: 4 GiB",
    ),
    "the limit of the slice above": (
        {**UNIT, **v2("/system.slice/kvkern.service", "max", GIB), **v2("/system.slice", 10 * GIB, 9 * GIB)},
        GIB, "/sys/fs/cgroup/system.slice: 10 GiB",
    ),
    "a container that sees the host's name of its group": (
        {
            "proc/self/cgroup": "0::/kubepods/pod1/c1\n", "proc/self/mountinfo": V2_MOUNT.format(top="/kubepods/pod1/c1"),
            **v2("/", 2 * GIB, GIB),
        },
        GIB, "2 GiB, of which 1 GiB are in use",
    ),
    "a group above the one that is mounted": (
        {"proc/self/cgroup": "0::/../other\n", "proc/self/mountinfo": V2_MOUNT.format(top="/"), **v2("/", 2 * GIB, GIB)},
        GIB, "2 GiB, of which",
    ),
    "version 1": ({**IN_V1, **v1("/", 300 * MIB, 50 * MIB)}, 250 * MIB, "memory: 300 MiB, of which 50 MiB are in use"),
    "version 1 full of page cache": ({**IN_V1, **v1("/", 300 * MIB, 290 * MIB, 200 * MIB)}, 210 * MIB, "90 MiB are in use"),
    "version 1 without a limit": ({**IN_V1, **v1("/", NO_LIMIT_V1, GIB)}, 32 * GIB, "MemAvailable"),
    "version 1 on the host": (
        {
            "proc/self/cgroup": V1_LINES, "proc/self/mountinfo": V1_MOUNT.format(top="/"),
            **v1("/docker/ab", NO_LIMIT_V1, GIB), **v1("/docker", 6 * GIB, 5 * GIB), **v1("/", NO_LIMIT_V1, GIB),
        },
        GIB, "memory/docker: 6 GiB",
    ),
    "both versions, the memory in version 1": (
        {
            "proc/self/cgroup": V1_LINES,
            "proc/self/mountinfo": V1_MOUNT.format(top="/docker/ab") + V2_MOUNT.format(top="/"),
            **v1("/", 3 * GIB, GIB),
        },
        2 * GIB, "3 GiB, of which 1 GiB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_left(case: str, tmp_path: Path) -> None:
    files, nbytes, source = CASES[case]
    found = free_memory(invented(tmp_path, files))
    assert found.nbytes == nbytes
    assert source in found.source


def test_a_machine_that_shows_nothing(tmp_path: Path) -> None:
    assert free_memory(tmp_path).nbytes > MIB


# -- a real group ----------------------------------------------------------------------------------------------------------

LIMIT = 300 * MIB
MAKE = """
import sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text("0")
if int(sys.argv[4]):  # fills the group with page cache
    with open(Path(sys.argv[2], "cache"), "wb") as file:
        for _ in range(int(sys.argv[4])):
            file.write(bytes(1 << 20))
from kvkern.arena.file import ArenaSpec, create_or_attach
from kvkern.arena.slots import SlotGeometry
from kvkern.errors import ArenaError
spec = ArenaSpec.for_capacity(SlotGeometry(1 << 20, 1), int(sys.argv[3]))
try:
    create_or_attach(spec, Path("/dev/shm", sys.argv[5]), expected=1)
except ArenaError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A group with a limit of 300 MiB below this process's own."""
    with memory_group(LIMIT) as group:
        yield group.path


def make_arena(group: Path, folder: Path, capacity: int, cache_mib: int = 0) -> subprocess.CompletedProcess[str]:
    name = f"kvkern-test-{os.getpid()}"
    command = [sys.executable, "-c", MAKE, str(group), str(folder), str(capacity), str(cache_mib), name]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    finally:
        Path("/dev/shm", name).unlink(missing_ok=True)


def test_an_arena_above_the_containers_limit_is_an_error_and_no_kill(limited_group: Path, tmp_path: Path) -> None:
    done = make_arena(limited_group, tmp_path, GIB)
    assert done.returncode == 1, done
    assert "the arena needs 1" in done.stderr
    assert "300 MiB, of which" in done.stderr


def test_page_cache_makes_room_for_an_arena(limited_group: Path, tmp_path: Path) -> None:
    """Weights that were just read fill the group with page cache. The kernel drops it for the arena."""
    done = make_arena(limited_group, tmp_path, 200 * MIB, cache_mib=250)
    assert done.returncode == 0, done
