"""Reads facts about GPUs from NVML and sysfs: name, driver, link, NUMA node, power state. It decides nothing.

NVML comes with the driver, its Python binding with `nvidia-ml-py`. If one is missing, the result is a line to print, no error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .link_table import HostLink

_SYSFS = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """One GPU. A field is 0 or None if NVML does not report it."""

    name: str  # "NVIDIA H100 80GB HBM3"
    driver: str  # "570.124.06"
    bus_id: str  # "0000:3b:00.0", as sysfs names it
    memory_nbytes: int
    generation: int  # the PCIe generation of the link now; the link of an idle GPU sleeps at 1
    generation_here: int  # the highest generation that GPU and slot allow
    generation_gpu: int  # the highest generation that the GPU is built for
    width: int  # lanes now
    width_gpu: int  # lanes that the GPU is built for
    numa_node: int | None
    power_state: int  # 0: full speed .. 15: idle
    c2c: bool  # NVLink-C2C to the CPU
    capability: int = 0  # major number of the compute capability: 9 for an H100

    @property
    def link(self) -> HostLink:
        """The link for the calibration table: what it can do when it is awake."""
        return HostLink(self.generation_here or self.generation, self.width, self.c2c)


@dataclass(frozen=True, slots=True)
class Gpus:
    """All GPUs of this host, or the reason why none is visible."""

    gpus: tuple[GpuInfo, ...]
    line: str  # what was found, for people to read
    cuda: int = 0  # the newest CUDA version that the driver supports: 12080 is 12.8

    def by_bus_id(self, bus_id: str) -> GpuInfo | None:
        """Return the GPU with this PCI address (in sysfs form); None if NVML did not show it."""
        return next((gpu for gpu in self.gpus if gpu.bus_id == bus_id.lower()), None)


def read_gpus(sysfs: Path = _SYSFS) -> Gpus:
    """Ask NVML for all GPUs. A missing library, driver or GPU raises nothing. It starts NVML and shuts it down."""
    try:
        import pynvml
    except ImportError:
        return Gpus((), "NVML: no Python binding; run `pip install nvidia-ml-py` to see link, driver and NUMA node")
    return _read(pynvml, sysfs)


def _read(nvml: Any, sysfs: Path) -> Gpus:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Gpus((), f"NVML: {error}; no NVIDIA driver here, or this container has no access to it")
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(nvml, handle, driver, sysfs) for handle in handles)
        cuda = int(_ask(nvml, lambda: nvml.nvmlSystemGetCudaDriverVersion(), 0))
    except nvml.NVMLError as error:
        return Gpus((), f"NVML: {error}; see what `nvidia-smi` says")
    finally:
        nvml.nvmlShutdown()
    return Gpus(gpus, f"NVML: {len(gpus)} GPU(s), driver {driver}", cuda)


def _gpu(nvml: Any, handle: Any, driver: str, sysfs: Path) -> GpuInfo:
    def ask(function: str, otherwise: Any = 0) -> Any:
        return _ask(nvml, lambda: getattr(nvml, function)(handle), otherwise)

    bus_id = _sysfs_name(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
    c2c = ask("nvmlDeviceGetC2cModeInfoV", None)
    memory = ask("nvmlDeviceGetMemoryInfo", None)
    capability = ask("nvmlDeviceGetCudaComputeCapability", (0, 0))
    return GpuInfo(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        driver=driver,
        bus_id=bus_id,
        memory_nbytes=0 if memory is None else int(memory.total),
        generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        generation_here=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        generation_gpu=ask("nvmlDeviceGetGpuMaxPcieLinkGeneration"),
        width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        width_gpu=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        numa_node=_numa_node(sysfs / bus_id),
        power_state=ask("nvmlDeviceGetPerformanceState"),
        c2c=bool(c2c is not None and c2c.isC2cEnabled),
        capability=capability[0],
    )


def _ask(nvml: Any, question: Callable[[], Any], otherwise: Any) -> Any:
    """Return the answer to `question`, or `otherwise` if the GPU, the driver or an old binding does not answer it."""
    try:
        return question()
    except (nvml.NVMLError, AttributeError):
        return otherwise


def _text(value: str | bytes) -> str:
    """Return text. Old bindings answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _sysfs_name(bus_id: str) -> str:
    """Return a PCI address in sysfs form. NVML writes the PCI domain with eight digits, sysfs with four."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _numa_node(device: Path) -> int | None:
    """Return the device's memory node; None if the firmware does not say, or the host has one node."""
    try:
        node = int((device / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
