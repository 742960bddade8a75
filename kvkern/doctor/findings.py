"""Judges facts. For each fault it yields one line on what is slow or broken, and why, and one line with the remedy.

Pure functions: `_judge_*` have the conditions, `_TEXTS` has the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from ..config import format_nbytes
from ..transfer.gpu.calibrate import unmeasured
from ..transfer.gpu.link_table import Direction, seed_calibration
from ..transfer.gpu.nvml import GpuInfo
from .facts import BATCH_API_CUDA, Facts


class Severity(StrEnum):
    """BROKEN alone makes `kvkern doctor` exit with 1."""

    BROKEN = "broken"  # kvkern cannot work on this host
    SLOW = "slow"
    NOTE = "note"  # may be intended


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of this host, or one thing to know about it."""

    severity: Severity
    what: str  # what is slow or broken, and why
    remedy: str


_SMALL_NBYTES = 1 << 30  # a smaller file system is taken for a default, not for the user's choice
_ASLEEP = 5  # a GPU in this power state or a higher one is idle
_FAR_BELOW = 0.7  # part of the speed that others measure on such a link; less is reported
_COLLAPSE_KERNEL = (6, 1)  # MADV_COLLAPSE


_TEXTS: dict[str, tuple[Severity, str, str]] = {  # name: (severity, what, remedy); values go into the braces
    "packages missing": (Severity.BROKEN, "kvkern cannot start: not installed: {names}", "pip install {names}"),
    "arena folder unusable": (
        Severity.BROKEN,
        "no arena can be made: {where} {fault}",
        "mount a tmpfs there, or give another --arena-dir",
    ),
    "arena on a disk": (
        Severity.SLOW,
        "stores are slow: {where} is on {fs}, a disk and not memory",
        "give --arena-dir a tmpfs such as /dev/shm",
    ),
    "mount too small": (
        Severity.BROKEN,
        "an arena of {needed} does not fit: {where} has {free} free",
        "mount -o remount,size=... {where}, docker run --shm-size=..., an emptyDir with medium: Memory",
    ),
    "small mount": (
        Severity.SLOW,
        "few chunks stay cached: {where} has only {size} in total",
        "mount -o remount,size=... {where}, docker run --shm-size=..., an emptyDir with medium: Memory",
    ),
    "too little memory": (
        Severity.BROKEN,
        "an arena of {needed} does not fit: only {memory} of memory are free {source}",
        "lower the capacity, or raise the limit (docker run --memory, resources.limits.memory, MemoryMax=)",
    ),
    "locked memory": (
        Severity.NOTE,
        "the start may fail: this process may lock {limit}, an arena takes {needed}; RDMA cards and some GPU drivers then do "
        "not register it",
        "ulimit -l unlimited, LimitMEMLOCK=infinity for a systemd unit, docker run --ulimit memlock=-1",
    ),
    "small pages": (
        Severity.SLOW,
        "copies on the CPU and the first touch of the arena are slower: the arena uses 4 KiB pages, because Linux {kernel} has "
        "shmem_enabled at {shmem_huge}",
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or Linux 6.1 and newer with anything but deny",
    ),
    "no AVX-512": (
        Severity.NOTE,
        "copies and keys on the CPU take more instructions: {cpu} has no AVX-512",
        "none is needed; a virtual machine may hide it (host-passthrough)",
    ),
    "one CPU": (
        Severity.SLOW,
        "copies and the engine share one CPU: this process may use only one",
        "give the container or the slice more CPUs (docker run --cpuset-cpus, taskset)",
    ),
    "numba cold": (
        Severity.SLOW,
        "the first start compiles for up to half a minute: {modules} not in numba's cache yet",
        "python -m kvkern.doctor.warm, at installation or in the image",
    ),
    "numba cache read-only": (
        Severity.SLOW,
        "every start compiles for up to half a minute: {modules} not in numba's cache, and it cannot be written",
        "python -m kvkern.doctor.warm, at installation or in the image; or set NUMBA_CACHE_DIR to a folder that can be written",
    ),
    "GPU unknown": (
        Severity.NOTE,
        "kvkern cannot read the GPU's properties: {nvml}",
        "pip install 'kvkern[gpu]'; in a container NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    ),
    "no batch copies": (
        Severity.SLOW,
        "each contiguous run is copied by its own call: batch copies need CUDA 12.8, the driver has {cuda}",
        "update the driver to R570 or newer",
    ),
    "no triton": (
        Severity.BROKEN,
        "KV on a GPU cannot be cached: without triton no kernel gathers it",
        "pip install 'kvkern[gpu]'",
    ),
    "torch for CPUs": (
        Severity.SLOW,
        "the GPU is not used: torch {torch} is a build for CPUs",
        "install the engine's own torch; the node's daemon needs none",
    ),
    "WSL2": (
        Severity.NOTE,
        "small transfers take two steps: under WSL2 a GPU kernel cannot use the arena's addresses, so there is no zero-copy",
        "none is needed; native Linux saves some microseconds",
    ),
    "narrow link": (
        Severity.SLOW,
        "loads and stores of {gpu} reach {width}/{width_gpu} of its link: it is x{width}, the GPU has x{width_gpu}",
        "another slot, BIOS bifurcation off, reseat the card or riser",
    ),
    "old link generation": (
        Severity.SLOW,
        "loads and stores of {gpu} reach 1/{part} of its link: slot or BIOS allow PCIe {here}, the GPU has {built}",
        "another slot, the slot's speed in the BIOS at Auto; a riser or switch may be the limit",
    ),
    "link asleep": (
        Severity.NOTE,
        "the link of {gpu} sleeps at PCIe {now} (power state P{power_state}); it wakes under load",
        "none is needed; run `kvkern doctor` again under load",
    ),
    "link trained down": (
        Severity.SLOW,
        "loads and stores of {gpu} are below the link's speed: PCIe {now} at power state P{power_state}, {here} is possible",
        "look for PCIe errors (dmesg | grep AER), reseat the card",
    ),
    "wrong NUMA node": (
        Severity.SLOW,
        "loads and stores of {gpu} cross between sockets: it is on NUMA node {node}, this process on {near}",
        "numactl --cpunodebind={node} --membind={node} before the engine and the daemon",
    ),
    "several NUMA nodes": (
        Severity.NOTE,
        "the arena may be on another socket than {gpu}: the GPU is on NUMA node {node}, this process may run on {near}",
        "numactl --cpunodebind={node} --membind={node} before the engine and the daemon",
    ),
    "GPU not measured": (
        Severity.NOTE,
        "{gpu} is not measured yet: the table holds published and estimated speeds",
        "start an engine with kvkern once, bound to the same NUMA nodes; measuring takes 20 ms plus compile time",
    ),
    "slow copies": (
        Severity.SLOW,
        "{copies} of {gpu} reach {has:.1f} GB/s; such a link reaches {others:.1f} GB/s",
        "check NUMA binding, IOMMU in passthrough (iommu=pt), ACS off between GPU and root port, other work on the link",
    ),
}


def _finding(name: str, **values: object) -> Finding:
    severity, what, remedy = _TEXTS[name]
    return Finding(severity, what.format(**values), remedy.format(**values))


def findings(facts: Facts) -> list[Finding]:
    """Return all findings, the worst first."""
    found = [finding for judge in _JUDGES for finding in judge(facts)]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))


def _judge_packages(facts: Facts) -> Iterator[Finding]:
    if facts.broken_imports:
        yield _finding("packages missing", names=" ".join(facts.broken_imports))


def _judge_arena(facts: Facts) -> Iterator[Finding]:
    where, nbytes = facts.arena_dir, facts.capacity_nbytes
    needed = format_nbytes(nbytes)
    if not facts.arena_writable:
        fault = "cannot be written" if facts.arena_fs else "is not there"
        yield _finding("arena folder unusable", where=where, fault=fault)
        return
    if facts.arena_fs not in ("tmpfs", "hugetlbfs", "ramfs"):
        yield _finding("arena on a disk", where=where, fs=facts.arena_fs)
    if nbytes > facts.arena_free_nbytes:
        yield _finding("mount too small", where=where, needed=needed, free=format_nbytes(facts.arena_free_nbytes))
    elif not nbytes and facts.arena_total_nbytes < _SMALL_NBYTES:
        yield _finding("small mount", where=where, size=format_nbytes(facts.arena_total_nbytes))
    if nbytes > facts.memory_nbytes:
        yield _finding(
            "too little memory", needed=needed, memory=format_nbytes(facts.memory_nbytes), source=facts.memory_source
        )


def _judge_locked_memory(facts: Facts) -> Iterator[Finding]:
    limit, needed = facts.memlock_nbytes, facts.needed_nbytes
    if facts.gpus and limit is not None and limit < needed:
        yield _finding("locked memory", limit=format_nbytes(limit), needed=format_nbytes(needed))


def _judge_huge_pages(facts: Facts) -> Iterator[Finding]:
    if facts.arena_fs != "tmpfs" or not facts.shmem_huge:
        return
    numbers = [int(part) for part in facts.kernel.split("-")[0].split(".")[:2] if part.isdigit()]
    if facts.shmem_huge == "deny" or (facts.shmem_huge == "never" and tuple(numbers) < _COLLAPSE_KERNEL):
        yield _finding("small pages", kernel=facts.kernel, shmem_huge=facts.shmem_huge)


def _judge_cpu(facts: Facts) -> Iterator[Finding]:
    if facts.cpu_flags and "avx512f" not in facts.cpu_flags:
        yield _finding("no AVX-512", cpu=facts.cpu or "this CPU")
    if len(facts.cpus) == 1:
        yield _finding("one CPU")


def _judge_numba(facts: Facts) -> Iterator[Finding]:
    if facts.numba_cold and not facts.broken_imports:
        name = "numba cold" if facts.numba_writable else "numba cache read-only"
        yield _finding(name, modules=", ".join(facts.numba_cold))


def _judge_driver(facts: Facts) -> Iterator[Finding]:
    if facts.has_nvidia_device and not facts.gpus:
        yield _finding("GPU unknown", nvml=facts.nvml)
    if not facts.gpus:
        return
    if 0 < facts.cuda < BATCH_API_CUDA:
        yield _finding("no batch copies", cuda=f"{facts.cuda // 1000}.{facts.cuda % 1000 // 10}")
    torch = facts.versions.get("torch", "")
    if torch and not torch.endswith("+cpu") and "triton" not in facts.versions:
        yield _finding("no triton")
    if torch.endswith("+cpu"):
        yield _finding("torch for CPUs", torch=torch)
    if facts.wsl:
        yield _finding("WSL2")


def _judge_links(facts: Facts) -> Iterator[Finding]:
    for number, gpu in enumerate(facts.gpus):
        yield from _judge_link(f"GPU {number}", gpu.info)


def _judge_link(gpu: str, info: GpuInfo) -> Iterator[Finding]:
    if info.c2c:
        return
    here, built = info.generation_here, info.generation_gpu
    if 0 < info.width < info.width_gpu:
        yield _finding("narrow link", gpu=gpu, width=info.width, width_gpu=info.width_gpu)
    if 0 < here < built:
        yield _finding("old link generation", gpu=gpu, part=1 << (built - here), here=here, built=built)
    if 0 < info.generation < here:
        name = "link asleep" if info.power_state >= _ASLEEP else "link trained down"
        yield _finding(name, gpu=gpu, now=info.generation, power_state=info.power_state, here=here)


def _judge_numa(facts: Facts) -> Iterator[Finding]:
    near = facts.process_nodes
    for number, gpu in enumerate(facts.gpus):
        node = gpu.info.numa_node
        if node is None or len(facts.nodes) < 2 or near == (node,):
            continue
        name = "several NUMA nodes" if node in near else "wrong NUMA node"
        yield _finding(name, gpu=f"GPU {number}", node=node, near=", ".join(map(str, near)) or "none")


def _judge_speeds(facts: Facts) -> Iterator[Finding]:
    for number, gpu in enumerate(facts.gpus):
        if not gpu.is_saved:
            yield _finding("GPU not measured", gpu=f"GPU {number}")
            continue
        expected = seed_calibration(gpu.info.link)
        left = unmeasured(gpu.table)
        for direction in Direction:
            if f"{direction} copy_gb_s" in left:
                continue
            has, others = gpu.table.costs(direction).copy_gb_s, expected.costs(direction).copy_gb_s
            if has < _FAR_BELOW * others:
                copies = "stores" if direction is Direction.D2H else "loads"
                yield _finding("slow copies", copies=copies, gpu=f"GPU {number}", has=has, others=others)


_JUDGES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _judge_packages, _judge_arena, _judge_links, _judge_numa, _judge_speeds, _judge_driver, _judge_locked_memory,
    _judge_huge_pages, _judge_numba, _judge_cpu,
)  # fmt: skip
