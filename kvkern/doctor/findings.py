"""Judges facts: for each fault one line that says what will be slow, or not run, and why, and one with the remedy. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from ..config import format_nbytes
from ..transfer.gpu.calibrate import unmeasured
from ..transfer.gpu.link_table import Direction, seeds
from .facts import BATCH_API_CUDA, Facts, Gpu


class Severity(StrEnum):
    """BROKEN alone makes `kvkern doctor` exit with 1."""

    BROKEN = "broken"  # kvkern cannot work like that
    SLOW = "slow"
    NOTE = "note"  # may be as it should be


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about this host."""

    severity: Severity
    what: str  # what will be slow or broken, and why
    remedy: str


_SMALL_NBYTES = 1 << 30  # less room than this for an arena is not meant
_ASLEEP = 5  # power states from here on are an idle GPU's
_FAR_BELOW = 0.7  # of what others measure on such a link
_COLLAPSE_KERNEL = (6, 1)  # MADV_COLLAPSE


def findings(facts: Facts) -> list[Finding]:
    """All of them, the worst first."""
    found = [finding for judge in _JUDGES for finding in judge(facts)]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))


def _packages(facts: Facts) -> Iterator[Finding]:
    if facts.broken_imports:
        names = " ".join(facts.broken_imports)
        yield Finding(Severity.BROKEN, f"kvkern cannot start: not installed: {names}", f"pip install {names}")


def _arena(facts: Facts) -> Iterator[Finding]:
    where, needed = facts.arena_dir, facts.capacity_nbytes
    mount = f"mount -o remount,size=... {where}, docker run --shm-size=..., an emptyDir with medium: Memory"
    if not facts.arena_writable:
        fault = "cannot be written" if facts.arena_fs else "is not there"
        yield Finding(
            Severity.BROKEN,
            f"no arena can be made: {where} {fault}",
            "mount a tmpfs there, or give another --arena-dir",
        )
        return
    if facts.arena_fs not in ("tmpfs", "hugetlbfs", "ramfs"):
        yield Finding(
            Severity.SLOW,
            f"every store will be written to a disk: {where} is on {facts.arena_fs}, not in memory",
            "give --arena-dir a tmpfs such as /dev/shm",
        )
    if needed > facts.arena_free_nbytes:
        free = format_nbytes(facts.arena_free_nbytes)
        yield Finding(
            Severity.BROKEN, f"an arena of {format_nbytes(needed)} does not fit: {where} has {free} free", mount
        )
    elif not needed and facts.arena_total_nbytes < _SMALL_NBYTES:
        size = format_nbytes(facts.arena_total_nbytes)
        yield Finding(Severity.SLOW, f"few chunks will stay cached: {where} holds {size} in all", mount)
    if needed > facts.memory_nbytes:
        yield Finding(
            Severity.BROKEN,
            f"an arena of {format_nbytes(needed)} does not fit: {format_nbytes(facts.memory_nbytes)} of memory can be had",
            "lower the capacity, or raise the container's memory limit",
        )


def _memlock(facts: Facts) -> Iterator[Finding]:
    limit, needed = facts.memlock_nbytes, facts.needed_nbytes
    if facts.gpus and limit is not None and limit < needed:
        yield Finding(
            Severity.NOTE,
            f"the start may fail: an RDMA card, or a GPU's driver that keeps to the limit, does not register the arena; this "
            f"process may lock {format_nbytes(limit)}, an arena takes {format_nbytes(needed)}",
            "ulimit -l unlimited, LimitMEMLOCK=infinity for a systemd unit, docker run --ulimit memlock=-1",
        )


def _huge_pages(facts: Facts) -> Iterator[Finding]:
    if facts.arena_fs != "tmpfs" or not facts.shmem_huge:
        return
    numbers = [int(part) for part in facts.kernel.split("-")[0].split(".")[:2] if part.isdigit()]
    off = facts.shmem_huge == "deny" or (facts.shmem_huge == "never" and tuple(numbers) < _COLLAPSE_KERNEL)
    if off:
        yield Finding(
            Severity.SLOW,
            f"copies on the CPU and the first touch of the arena will be slower: it lies on pages of 4 KiB, as Linux "
            f"{facts.kernel} has shmem_enabled at {facts.shmem_huge}",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or Linux 6.1 and newer with anything but deny",
        )


def _cpu(facts: Facts) -> Iterator[Finding]:
    if facts.cpu_flags and "avx512f" not in facts.cpu_flags:
        yield Finding(
            Severity.NOTE,
            f"copies and keys on the CPU take more instructions: {facts.cpu or 'this CPU'} has no AVX-512",
            "none is needed; a virtual machine may hide it (host-passthrough)",
        )
    if len(facts.cpus) == 1:
        yield Finding(
            Severity.SLOW,
            "copies and the engine share one CPU: this process may run on no other",
            "give the container or the slice more (docker run --cpuset-cpus, taskset)",
        )


def _numba(facts: Facts) -> Iterator[Finding]:
    if facts.numba_cold and not facts.broken_imports:
        yield Finding(
            Severity.SLOW,
            f"the first start compiles for seconds: {', '.join(facts.numba_cold)} not in numba's cache yet",
            "python -m kvkern.kernels.warm, at installation or in the image",
        )
    if not facts.numba_writable:
        yield Finding(
            Severity.SLOW,
            "every start compiles for seconds: numba's cache cannot be written",
            "NUMBA_CACHE_DIR=a folder that stays and can be written",
        )


def _driver(facts: Facts) -> Iterator[Finding]:
    if facts.has_nvidia_device and not facts.gpus:
        yield Finding(
            Severity.NOTE,
            f"nothing is known of the GPU here: {facts.nvml}",
            "pip install 'kvkern[gpu]'; in a container NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )
    if not facts.gpus:
        return
    if 0 < facts.cuda < BATCH_API_CUDA:
        has = f"{facts.cuda // 1000}.{facts.cuda % 1000 // 10}"
        yield Finding(
            Severity.SLOW,
            f"runs are copied one call each: batch copies need CUDA 12.8, the driver has {has}",
            "update the driver to R570 or newer",
        )
    torch = facts.versions.get("torch", "")
    if torch and not torch.endswith("+cpu") and "triton" not in facts.versions:
        yield Finding(
            Severity.BROKEN,
            "KV on a GPU cannot be cached: without triton no kernel gathers it",
            "pip install 'kvkern[gpu]'",
        )
    if torch.endswith("+cpu"):
        yield Finding(
            Severity.SLOW,
            f"the GPU is not used: torch {torch} is a build for CPUs",
            "install the engine's own torch; the node's daemon needs none",
        )
    if facts.wsl:
        yield Finding(
            Severity.NOTE,
            "small transfers take two steps: under WSL2 a kernel cannot use the arena's addresses, so there is no zero-copy",
            "none; run on Linux itself for the last microseconds",
        )


def _links(facts: Facts) -> Iterator[Finding]:
    for number, gpu in enumerate(facts.gpus):
        yield from _link(f"GPU {number}", gpu)


def _link(name: str, gpu: Gpu) -> Iterator[Finding]:
    info = gpu.info
    if info.c2c:
        return
    if 0 < info.width < info.width_gpu:
        yield Finding(
            Severity.SLOW,
            f"loads and stores of {name} reach {info.width}/{info.width_gpu} of its link: it is x{info.width}, the GPU has "
            f"x{info.width_gpu}",
            "another slot, BIOS bifurcation off, reseat the card or riser",
        )
    if 0 < info.generation_here < info.generation_gpu:
        part = 1 << (info.generation_gpu - info.generation_here)
        yield Finding(
            Severity.SLOW,
            f"loads and stores of {name} reach 1/{part} of its link: slot or BIOS allow PCIe {info.generation_here}, the GPU "
            f"has {info.generation_gpu}",
            "another slot, the slot's speed in the BIOS at Auto; a riser or switch may be the limit",
        )
    if 0 < info.generation < info.generation_here:
        if info.power_state >= _ASLEEP:
            yield Finding(
                Severity.NOTE,
                f"the link of {name} sleeps at PCIe {info.generation} (power state P{info.power_state}); it wakes under load",
                "none; ask again while it works",
            )
        else:
            yield Finding(
                Severity.SLOW,
                f"loads and stores of {name} are below the link's speed: PCIe {info.generation} at power state "
                f"P{info.power_state}, {info.generation_here} is possible",
                "look for PCIe errors (dmesg | grep AER), reseat the card",
            )


def _numa(facts: Facts) -> Iterator[Finding]:
    near = facts.process_nodes
    for number, gpu in enumerate(facts.gpus):
        node = gpu.info.numa_node
        if node is None or len(facts.nodes) < 2 or near == (node,):
            continue
        bind = f"numactl --cpunodebind={node} --membind={node} before the engine and the daemon"
        if node not in near:
            yield Finding(
                Severity.SLOW,
                f"loads and stores of GPU {number} cross between sockets: it is on NUMA node {node}, this process on "
                f"{_list(near)}",
                bind,
            )
        else:
            yield Finding(
                Severity.NOTE,
                f"the arena of GPU {number} may lie on another socket: it is on NUMA node {node}, this process may run on "
                f"{_list(near)}",
                bind,
            )


def _list(nodes: tuple[int, ...]) -> str:
    return ", ".join(map(str, nodes)) or "none"


def _speeds(facts: Facts) -> Iterator[Finding]:
    for number, gpu in enumerate(facts.gpus):
        if not gpu.is_saved:
            yield Finding(
                Severity.NOTE,
                f"GPU {number} is not measured yet: the table holds what others have published and estimates",
                "start an engine with kvkern once, bound to the same NUMA nodes; it takes 20 ms and what compiling takes",
            )
            continue
        expected = seeds(gpu.info.link)
        left = unmeasured(gpu.table)
        for direction in Direction:
            if f"{direction} copy_gb_s" in left:
                continue
            has, others = gpu.table.costs(direction).copy_gb_s, expected.costs(direction).copy_gb_s
            if has < _FAR_BELOW * others:
                name = "stores" if direction is Direction.D2H else "loads"
                yield Finding(
                    Severity.SLOW,
                    f"{name} of GPU {number} reach {has:.1f} GB/s; {others:.1f} are to be had on such a link",
                    "NUMA binding, IOMMU in passthrough (iommu=pt), ACS off between GPU and root port, other work on the link",
                )


_JUDGES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _packages, _arena, _links, _numa, _speeds, _driver, _memlock, _huge_pages, _numba, _cpu,
)  # fmt: skip
